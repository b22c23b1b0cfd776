"""What is computed of a suspect: one vector per class, in the space of φ and among the patterns' frequencies.

This module is one side of a wall. It imports nothing of keys or carriers, so that nothing here can depend on them; a
test walks its imports. A p-value is exact for that reason alone: whatever a class vector is computed from, a carrier
drawn independently of it has a uniform direction beside it. What the vectors are is only a matter of power.

For each class the suspect is asked which way it wants an image changed to be surer of the class (its input gradient).
In the space of φ the *response* says how φ moves along with that change. The suspect's last layer gives a second vector
there, carried over by a ridge regression of features (section 4.4 of the paper). Among the frequencies it is the mean
of the gradients themselves. What any honest network would show is taken off: what the classes have in common, and what
a reference classifier that has seen no mark answers. Frequencies in which single images vary most count less.

Vectors are float64 on the CPU.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from radiotag.cosines import PATTERN_DIMENSION, pattern_coefficients
from radiotag.networks import SMALL_IMAGE, Network

FEW_IMAGES = 50  # of a class, where MANY_IMAGES allows it: the mean answer of fewer is largely chance
MANY_IMAGES = 5000  # labelled images, or gradients, for many classes at most
GRADIENTS = 1200  # response gradients without labels, shared among the classes; up to MANY_IMAGES for many classes
TOP_IMAGES = 400  # images at most asked about one class without labels: the more, the less like it
# Penalty of the ridge alignment and its weight beside the response. Synthetic images align two feature spaces worse.
RIDGE_LABELLED, RIDGE_UNLABELLED = (0.1, 1.0), (0.5, 0.5)
RIDGE_REFERENCE = 0.1


# ---------------------------------------------------------------- what travels


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """How many images are computed together, and who is told how far it is."""

    size: int = 64
    tell: Callable[[str, int, int], None] = lambda *_: None  # (what is done, images done, images in all)

    def split(self, images: Tensor, what: str) -> Iterator[Tensor]:
        """The images batch by batch; `tell` hears of each batch when the next one is asked for."""
        done = 0
        for batch in torch.split(images, self.size):
            yield batch
            done += len(batch)
            self.tell(what, done, len(images))


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedClasses:
    """Which of a suspect's outputs are compared, and what is known of their classes. No carrier is in it."""

    outputs: tuple[int, ...]  # of the suspect, one a class
    labels: tuple[int, ...] | None = None  # (N,) of the images: positions in `outputs`, −1 for other classes
    marker_outputs: tuple[int, ...] | None = None  # the marking network's for the same classes, if it knows them all
    marker_besides: tuple[int, ...] = ()  # the marking network's for further classes that the suspect knows


class Suspect(NamedTuple):
    """A suspect and what it answered to the reference's images."""

    network: Network
    log_probabilities: Tensor  # (N, C')


class Probes(NamedTuple):
    """Images, each of which is asked about one class."""

    pixels: Tensor  # (N, 3, H, W) in [0, 1]
    places: Tensor  # (N',) of those that are asked about
    labels: Tensor  # (N',) their classes, positions among the outputs


class GradientResponse(NamedTuple):
    """What one network's gradients say of its classes."""

    response: Tensor  # (C, d), in the space of φ
    pattern: Tensor  # (C, m), in the patterns' space
    scatter: Tensor  # (m, m), the covariance of single images' parts in it within a class


class ReferenceClassifier(NamedTuple):
    """A network that has seen no mark, and what it says of the compared classes."""

    network: nn.Module
    outputs: tuple[int, ...]  # one a class
    rows: Tensor | None  # (C, d) in the space of φ; None where they are all that there is to a suspect


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassVectors:
    """What was computed of one suspect, a row per compared output."""

    features: Tensor  # (C, d), to be compared with the feature carriers u
    pattern: Tensor | None = None  # (C, m), to be compared with the patterns v
    paper: Tensor | None = None  # (C, d) of the paper's alignment; None without a linear head
    r2: float | None = None  # of the paper's alignment


class Reference:
    """The marking network and the images that all suspects of a run are asked with.

    What depends on these alone is computed once: φ's features, and the responses of the reference classifier.
    """

    def __init__(self, marker: Network, pixels: Tensor, labels: Sequence[str] = ()) -> None:
        """pixels: (N, 3, H, W) in [0, 1], unmarked; labels: their class names, or none."""
        self.marker, self.pixels, self.labels = marker, pixels, tuple(labels)
        self._features: Tensor | None = None
        self._responses: dict[ComparedClasses, GradientResponse] = {}

    def features(self, batching: Batching) -> Tensor:
        """φ of the images, (N, d)."""
        if self._features is None:
            self._features = features(self.marker, self.pixels, batching)
        return self._features

    def responses(
        self, classifier: ReferenceClassifier, classes: ComparedClasses, probes: Probes, batching: Batching
    ) -> GradientResponse:
        """The reference classifier's; kept where no suspect had a part in the choice of classifier and probes."""
        kept = ComparedClasses(  # all that a labelled answer depends on
            outputs=classifier.outputs, labels=classes.labels,
            marker_outputs=classes.marker_outputs, marker_besides=classes.marker_besides,
        )  # fmt: skip
        if kept in self._responses:
            return self._responses[kept]
        found = gradient_responses(self.marker, classifier.network, classifier.outputs, probes, batching)
        if _labels_suffice(classes):
            self._responses[kept] = found
        return found


def _labels_suffice(classes: ComparedClasses) -> bool:
    """Whether the reference classifier comes of labels or of φ alone, and the probes of labels."""
    labels = set(classes.labels or ())
    return classes.labels is not None and (classes.marker_outputs is not None or len(labels) > 1)


# ---------------------------------------------------------------- what networks answer


@contextmanager
def _forward_mode() -> Iterator[None]:
    """Attention in elementary operations: the fused kernels have no forward-mode derivative."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)  # torch's own use
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _finite(values: Tensor, what: str) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise FloatingPointError(f"its {what} are not finite for some images")
    return values


@torch.no_grad()
def features(network: Network, pixels: Tensor, batching: Batching) -> Tensor:
    """(N, 3, H, W) in [0, 1] → penultimate features (N, d). FloatingPointError unless all are finite."""
    device = network.device
    parts = [network.features(x.to(device)).cpu().double() for x in batching.split(pixels, "features")]
    return _finite(torch.cat(parts), "features")


def log_probabilities(logits: Tensor) -> Tensor:
    """(B, C') logits → log-probabilities; a single output is a sigmoid's. FloatingPointError unless all are finite."""
    single = logits.shape[1] == 1
    return F.pad(_finite(logits, "outputs"), (0, int(single))).log_softmax(1)[:, : logits.shape[1]]


def log_odds(logits: Tensor, outputs: Tensor) -> Tensor:
    """(B, C') logits, an output (B,) of each → (B,): log p/(1 − p) of it. FloatingPointError unless all are finite.

    Its gradient has the direction of log p's, and does not vanish where 1 − p is lost to rounding. Otherwise a last
    layer multiplied by a constant, which changes no decision, would silence it.
    """
    scores = F.pad(_finite(logits, "outputs"), (0, int(logits.shape[1] == 1)))  # (B, C') or (B, 2)
    others = scores.scatter(1, outputs[:, None], -math.inf).logsumexp(1)  # (B,)
    return scores.gather(1, outputs[:, None])[:, 0] - others


@torch.no_grad()
def log_answers(network: Network, pixels: Tensor, batching: Batching) -> Tensor:
    """(N, 3, H, W) in [0, 1] → log-probabilities (N, C')."""
    device = network.device
    parts = [log_probabilities(network(x.to(device)).cpu().double()) for x in batching.split(pixels, "answers")]
    return torch.cat(parts)


def ask(network: Network, reference: Reference, batching: Batching) -> Suspect:
    """Show a suspect the reference's images. FloatingPointError where its outputs are not finite."""
    return Suspect(network, log_answers(network, reference.pixels, batching))


# ---------------------------------------------------------------- alignment (section 4.4)


def ridge_regression(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """M (d, k) with y ≈ x·M, for x (N, d) and y (N, k); penalty relative to the Gram matrix's mean diagonal."""
    gram = x.T @ x  # (d, d)
    gram.diagonal().add_(penalty * float(gram.diagonal().mean()) + 1e-12)
    solution: Tensor = torch.linalg.solve(gram, x.T @ y)
    return solution


def aligned_rows(phi: Tensor, psi: Tensor, weight: Tensor, ridge: float) -> tuple[Tensor, float]:
    """The suspect's class rows carried into the marking space: w_c = M·W_c with ψ ≈ φ·M (section 4.4).

    phi (N, d), psi (N, k), weight (C, k). ridge is relative to the Gram matrix's mean diagonal; 0 is the paper's least
    squares (minimum norm, so that rank-deficient features do no harm). Returns (C, d) and R² of the fit.
    """
    matrix = ridge_regression(phi, psi, ridge) if ridge else torch.linalg.lstsq(phi, psi, driver="gelsd").solution
    spread = float((psi - psi.mean(0)).square().sum())
    r2 = 1 - float((psi - phi @ matrix).square().sum()) / spread if spread > 0 else 0.0
    return weight @ matrix.T, r2


# ---------------------------------------------------------------- gradients


def gradient_responses(
    marker: Network, network: nn.Module, outputs: Sequence[int], probes: Probes, batching: Batching
) -> GradientResponse:
    """Which way φ, and the pattern, move when an image moves up the network's gradient for its class.

    r_c = mean over x of J_φ(x)·g / ‖J_φ(x)·g‖ with g = ∇_x `log_odds` of class c, and the mean over x of g / ‖g‖ in the
    patterns' space, with its terms' covariance. The mean is over the probes of class c. It asks for no alignment, no
    linear head and no features of the network.
    """
    column, labels = torch.tensor(list(outputs)), probes.labels
    total, seen = torch.zeros(len(outputs), marker.dimension, dtype=torch.float64), []
    pairs = torch.stack([probes.places, labels], 1)  # (N', 2)
    with _forward_mode():
        for places, classes in (batch.T for batch in batching.split(pairs, "gradients")):
            pushed, parts = _gradient(marker, network, probes.pixels[places], column[classes])
            total.index_add_(0, classes, F.normalize(pushed, dim=1))
            seen.append(parts)  # (B, m)
    count = torch.bincount(labels, minlength=len(outputs)).clamp_min(1)[:, None]  # (C, 1)
    parts = torch.cat(seen)  # (N', m)
    pattern = total.new_zeros(len(outputs), PATTERN_DIMENSION).index_add_(0, labels, parts) / count
    rest = parts - pattern[labels]
    return GradientResponse(response=total / count, pattern=pattern, scatter=rest.T @ rest / len(rest))


def _gradient(marker: Network, network: nn.Module, pixels: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Unit gradients of one batch, (B, 3, H, W), as φ moves along them, (B, d), and in the patterns' space, (B, m)."""
    x = pixels.to(marker.device).requires_grad_()
    surer = log_odds(network(x), outputs.to(marker.device))  # (B,)
    (g,) = torch.autograd.grad(surer.sum(), x)
    g = torch.nan_to_num(g, 0.0, 0.0, 0.0)  # an overflowing gradient has no direction to tell of
    g = g / g.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-30)  # or its square might underflow
    g = g / g.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, 1, 1, 1)
    pushed = torch.func.jvp(marker.features, (x.detach(),), (g,))[1]  # (B, d)
    return pushed.detach().cpu().double(), pattern_coefficients(g)


def top_images_per_class(log_probabilities: Tensor, outputs: Sequence[int], count: int) -> Tensor:
    """(C, count) places of the images that the suspect most takes for each class, by its log-probabilities (N, C').

    Of images without labels, they answer best. Only the suspect is looked at.
    """
    return log_probabilities[:, list(outputs)].topk(min(count, len(log_probabilities)), dim=0).indices.T


def images_per_class(classes: int, size: int) -> int:
    """How many images without labels are asked about each class; of many classes fewer, and of large images."""
    few = min(FEW_IMAGES, MANY_IMAGES // classes) if size <= SMALL_IMAGE else 0
    return max(8, few, min(TOP_IMAGES, GRADIENTS // classes))


def choose_probes(reference: Reference, suspect: Suspect, classes: ComparedClasses) -> Probes:
    """The labelled images of the compared classes; without labels those that the suspect takes for each class."""
    if classes.labels is not None:
        labels = torch.tensor(classes.labels)
        places = torch.nonzero(labels >= 0)[:, 0]
        return Probes(reference.pixels, places, labels[places])
    count = images_per_class(len(classes.outputs), reference.pixels.shape[3])
    top = top_images_per_class(suspect.log_probabilities, classes.outputs, count)  # (C, n)
    return Probes(reference.pixels, top.flatten(), torch.arange(len(top)).repeat_interleave(top.shape[1]))


# ---------------------------------------------------------------- what any network would answer


class LinearProbe(nn.Module):
    """A linear classifier on φ's features, rows (K, d): what a network that has seen no mark answers for classes."""

    def __init__(self, marker: Network, rows: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.marker, self.rows, self.bias = marker, rows, bias

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] → logits (B, K)."""
        seen = self.marker.features(pixels)  # (B, d)
        return F.linear(seen, self.rows.to(seen), None if self.bias is None else self.bias.to(seen))


@torch.no_grad()
def restricted_marker(marker: Network, outputs: Sequence[int]) -> tuple[LinearProbe, Tensor]:
    """φ as a classifier of some of its outputs alone, and its rows (K, d) of them.

    What tells these from φ's other classes is mostly nothing that the suspect has learnt.
    """
    head = marker.head
    assert head is not None
    rows = head.weight[list(outputs)]
    rows = rows - rows.mean(0)  # which its softmax does not see
    bias = None if head.bias is None else head.bias[list(outputs)]
    return LinearProbe(marker, rows, bias), rows.cpu().double()


@torch.no_grad()
def regression_rows(phi: Tensor, targets: Tensor) -> Tensor:
    """Ridge regression of targets (N, C) on features phi (N, d), both centred here: rows (C, d)."""
    return ridge_regression(phi - phi.mean(0), targets - targets.mean(0), RIDGE_REFERENCE).T


def _with_no_class(rows: Tensor) -> Tensor:
    """(C, d) → (C + 1, d): the last output is zero, for none of the classes."""
    return F.pad(rows, (0, 0, 0, 1))


def reference_classifier(
    reference: Reference, suspect: Suspect, classes: ComparedClasses, batching: Batching
) -> ReferenceClassifier:
    """A network that has never seen a mark, to answer for the compared classes.

    The marking network itself, where it knows the classes. Its rows are as if it knew only these and the further ones
    that the suspect knows. Without labels so are its answers: on images of no class they would mostly tell these
    classes from φ's others, which the suspect has never seen.
    Elsewhere a linear probe on φ's features: of labelled images, unless all are of one class, or else of the suspect's
    probabilities. The latter has no rows: they are all that there is to a suspect whose features are φ's.
    """
    marker, positions = reference.marker, tuple(range(len(classes.outputs)))
    if classes.marker_outputs is not None and marker.head is not None:
        return _known_classifier(marker, classes)
    labels, phi = torch.tensor(classes.labels or ()), reference.features(batching)  # (N, d)
    if len(labels) and bool((labels != labels[0]).any()):
        rows = regression_rows(phi, (labels[:, None] == torch.arange(len(positions))).double())
        return ReferenceClassifier(LinearProbe(marker, _with_no_class(rows)), positions, rows)
    rows = regression_rows(phi, suspect.log_probabilities[:, list(classes.outputs)].exp())
    return ReferenceClassifier(LinearProbe(marker, _with_no_class(rows)), positions, None)


def _known_classifier(marker: Network, classes: ComparedClasses) -> ReferenceClassifier:
    """The marking network, which knows the classes: as it is, or restricted to those that the suspect knows."""
    known = classes.marker_outputs
    assert known is not None and marker.head is not None
    if len(known) + len(classes.marker_besides) == 1:
        return ReferenceClassifier(marker, known, marker.head.weight.cpu().double()[list(known)])
    probe, rows = restricted_marker(marker, (*known, *classes.marker_besides))
    rows = rows[: len(known)]
    if classes.labels is None:
        return ReferenceClassifier(probe, tuple(range(len(known))), rows)
    return ReferenceClassifier(marker, known, rows)


# ---------------------------------------------------------------- class vectors


def center_over_classes(rows: Tensor) -> Tensor:
    """Rows (C, d) minus (1 − 2/C) times their mean: what all classes have alike is mostly what any network answers.

    With few classes less is taken off, as much of their mean is each one's own mark. Rows of zeros stay, and do not
    count.
    """
    alive = rows.any(dim=1, keepdim=True)  # (C, 1)
    count = max(2, int(alive.sum()))
    shared: Tensor = alive * rows.sum(0) * (1 - 2 / count) / count
    return rows - shared


def whitening(scatter: Tensor) -> Tensor:
    """(S/s + I)^(−½), (m, m), for a covariance S of mean variance s: what varies from image to image counts less.

    A network's answers are loudest where natural images vary, and that is noise here. S comes from the suspect alone.
    """
    mean = float(scatter.diagonal().mean())  # of parts of unit vectors: below 1e-12 it is what rounding leaves
    values, vectors = torch.linalg.eigh(scatter / max(mean, 1e-12))
    root: Tensor = (vectors * (values.clamp_min(0) + 1).rsqrt()) @ vectors.T
    return root


def remove_projection(rows: Tensor, directions: Tensor) -> Tensor:
    """Rows (C, d) less their part along the same row of `directions` (C, d)."""
    units = F.normalize(directions, dim=1)
    remainder: Tensor = rows - (rows * units).sum(1, keepdim=True) * units
    return remainder


def class_vectors(
    reference: Reference, suspect: Suspect, classes: ComparedClasses, batching: Batching | None = None
) -> ClassVectors:
    """The declared statistic's vectors and the paper's, a row per compared output.

    All images serve the alignment; the response is asked with the probes (`choose_probes`). What the classes share is
    taken off (`center_over_classes`), the pattern is whitened, and what a reference classifier answers is removed
    class by class. FloatingPointError where the suspect's outputs or features are not finite.
    """
    batching = batching or Batching()
    classifier = reference_classifier(reference, suspect, classes, batching)
    probes = choose_probes(reference, suspect, classes)
    theirs = gradient_responses(reference.marker, suspect.network, classes.outputs, probes, batching)
    usual = reference.responses(classifier, classes, probes, batching)
    white = whitening(theirs.scatter)
    pattern = remove_projection(
        center_over_classes(theirs.pattern) @ white, center_over_classes(usual.pattern) @ white
    )  # (C, m)
    response = remove_projection(center_over_classes(theirs.response), center_over_classes(usual.response))
    vectors = F.normalize(response, dim=1)  # (C, d)
    if suspect.network.head is None:
        return ClassVectors(features=vectors, pattern=pattern)
    ridge, paper, r2 = _head_vectors(reference, suspect, classes, batching)
    if classifier.rows is not None:
        ridge = remove_projection(ridge, center_over_classes(classifier.rows))
    share = (RIDGE_UNLABELLED if classes.labels is None else RIDGE_LABELLED)[1]
    return ClassVectors(features=vectors + share * F.normalize(ridge, dim=1), pattern=pattern, paper=paper, r2=r2)


def _head_vectors(
    reference: Reference, suspect: Suspect, classes: ComparedClasses, batching: Batching
) -> tuple[Tensor, Tensor, float]:
    """The last layer's rows in the space of φ: by ridge regression, centred; by the paper's least squares, with R²."""
    network, phi = suspect.network, reference.features(batching)
    assert network.head is not None
    psi = features(network, reference.pixels, batching)  # (N, k)
    weight = network.head.weight.cpu().double()[list(classes.outputs)]  # (C, k)
    paper, r2 = aligned_rows(phi, psi, weight, 0.0)
    penalty = (RIDGE_UNLABELLED if classes.labels is None else RIDGE_LABELLED)[0]
    return center_over_classes(aligned_rows(phi, psi, weight, penalty)[0]), paper, r2
