"""`python -m radiotag`."""

from radiotag.cli import main

if __name__ == "__main__":
    main()
