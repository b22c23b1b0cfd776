"""Vectors computed from a suspect: for each class one in the feature space of φ and one in the space of the patterns.

This module is one side of a wall. It imports nothing about keys or carriers, so that nothing here can depend on them; a
test checks its imports. This independence alone makes the p-value exact: relative to any class vector, an independently
drawn carrier has a uniform direction. How the vectors are computed only changes the power of the test.

For each class the suspect's input gradient says which change of an image raises its score for the class. In the feature
space of φ, the *response* is the direction in which φ moves under that change. The suspect's last layer gives a second
vector in this space: a ridge regression of features aligns the two spaces (section 4.4 of the paper). In the space of
the patterns, the vector is the mean of the gradients themselves. Two parts that any honest network would show are
removed: the part that all classes share, and the response of a reference classifier that has seen no mark. Directions
in which single images vary most get less weight.

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
from radiotag.errors import RadiotagError
from radiotag.networks import SMALL_IMAGE, Network

FEW_IMAGES = 50  # per class, if MANY_IMAGES allows it: the mean over fewer images is largely chance
MANY_IMAGES = 5000  # upper limit of labelled images, or gradients, if there are many classes
GRADIENTS = 1200  # response gradients without labels, shared among the classes; up to MANY_IMAGES for many classes
TOP_IMAGES = 400  # upper limit of images per class without labels: further images resemble the class less
# Penalty of the ridge alignment, and its weight relative to the response. Synthetic images align feature spaces worse.
RIDGE_LABELLED, RIDGE_UNLABELLED = (0.1, 1.0), (0.5, 0.5)
RIDGE_REFERENCE = 0.1
FEW_PHOTOGRAPHS, MOST_PHOTOGRAPHS = 300, 800  # asked without labels: more of them resemble their class less
OF_EACH = 8  # photographs of each class, as long as they are not too many together; one in any case
LEFT_OUT = 0.5  # share of the images for which a suspect may be not finite


# ---------------------------------------------------------------- what travels


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """How many images are computed together, and the callback for progress."""

    size: int = 64
    tell: Callable[[str, int, int], None] = lambda *_: None  # (activity, images done, images in total)

    def split(self, images: Tensor, activity: str) -> Iterator[Tensor]:
        """Yield the images batch by batch; `tell` is called for a batch when the next one is requested."""
        done = 0
        for batch in torch.split(images, self.size):
            yield batch
            done += len(batch)
            self.tell(activity, done, len(images))


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedClasses:
    """Which of a suspect's outputs are compared, and what is known about their classes. It contains no carrier."""

    outputs: tuple[int, ...]  # of the suspect, one per class
    labels: tuple[int, ...] | None = None  # (N,) of the images: positions in `outputs`, −1 for other classes
    marker_outputs: tuple[int, ...] | None = None  # of the marking network for the same classes, if it knows them all
    marker_besides: tuple[int, ...] = ()  # of the marking network for further classes that the suspect knows
    others: bool  # whether images of other classes are asked, too, what would make them a class's
    few: bool = False  # whether of photographs few are asked, if they have no labels


class Suspect(NamedTuple):
    """A suspect and what it answers to the reference's images."""

    network: Network
    log_probabilities: Tensor  # (N, C')
    features: Tensor | None = None  # (N, k), the input of its last linear layer, if it has one


class Probes(NamedTuple):
    """Images for the responses, and the classes that they are asked for."""

    pixels: Tensor  # (N, 3, H, W) in [0, 1]
    places: Tensor  # (N',) positions among `pixels`
    asked: Tensor  # (N', q) classes, as positions among the compared outputs; the image's own is the first


class GradientResponse(NamedTuple):
    """The mean gradients of one network, per class."""

    response: Tensor  # (C, d), in the feature space of φ; with images of other classes, the sum of two unit vectors
    pattern: Tensor  # (C, m), in the space of the patterns
    scatter: Tensor  # (m, m), covariance within a class of the gradients of single images, in the space of the patterns


class ReferenceClassifier(NamedTuple):
    """A network that has seen no mark, to be compared with the suspect."""

    network: nn.Module
    outputs: tuple[int, ...]  # one per class
    rows: Tensor | None  # (C, d) class weights in the space of φ; None if they come from the suspect's outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassVectors:
    """The vectors of one suspect, one row per compared output."""

    features: Tensor  # (C, d), to be compared with the feature carriers u
    pattern: Tensor | None = None  # (C, m), to be compared with the patterns v
    paper: Tensor | None = None  # (C, d) from the paper's alignment; None without a linear head
    r2: float | None = None  # R² of the paper's alignment

    def only(self, positions: Sequence[int]) -> "ClassVectors":
        """The rows of some classes."""
        rows = list(positions)
        pattern, paper = (None if part is None else part[rows] for part in (self.pattern, self.paper))
        return ClassVectors(features=self.features[rows], pattern=pattern, paper=paper, r2=self.r2)


class Reference:
    """The marking network and the images that are shown to all suspects of a run.

    Values that depend on these alone are computed once: the features φ and the responses of the reference classifier.
    """

    def __init__(self, marker: Network, pixels: Tensor, labels: Sequence[str] = (), name: str = "the images") -> None:
        """pixels: (N, 3, H, W) in [0, 1], unmarked; labels: their class names, or none; name: for messages."""
        self.marker, self.pixels, self.labels, self.name = marker, pixels, tuple(labels), name
        self._features: Tensor | None = None
        self._responses: dict[ComparedClasses, GradientResponse] = {}

    def only(self, usable: Tensor) -> "Reference":
        """The reference with some of its images; usable: (N,) bool."""
        labels = [name for name, kept in zip(self.labels, usable.tolist(), strict=True) if kept] if self.labels else ()
        return Reference(self.marker, self.pixels[usable], labels, self.name)

    def features(self, batching: Batching) -> Tensor:
        """The features φ of the images, (N, d)."""
        if self._features is None:
            self._features = features(self.marker, self.pixels, batching)
        return self._features

    def responses(
        self, classifier: ReferenceClassifier, classes: ComparedClasses, probes: Probes, batching: Batching
    ) -> GradientResponse:
        """The reference classifier's response, cached if neither the classifier nor the probes depend on a suspect."""
        index = ComparedClasses(  # everything that the response depends on if there are labels
            outputs=classifier.outputs, labels=classes.labels,
            marker_outputs=classes.marker_outputs, marker_besides=classes.marker_besides, others=classes.others,
            few=classes.few,
        )  # fmt: skip
        if index in self._responses:
            return self._responses[index]
        response = gradient_responses(self.marker, classifier.network, classifier.outputs, probes, batching)
        if _labels_suffice(classes):
            self._responses[index] = response
        return response


def _labels_suffice(classes: ComparedClasses) -> bool:
    """Whether the reference classifier follows from labels or φ alone, and the probes from labels alone."""
    labels = set(classes.labels or ())
    return classes.labels is not None and (classes.marker_outputs is not None or len(labels) > 1)


# ---------------------------------------------------------------- what networks answer


@contextmanager
def _forward_mode() -> Iterator[None]:
    """Compute attention in elementary operations, because the fused kernels have no forward-mode derivative."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)  # from torch itself
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@torch.no_grad()
def features(network: Network, pixels: Tensor, batching: Batching) -> Tensor:
    """(N, 3, H, W) in [0, 1] → penultimate features (N, d) in float64."""
    device = network.device
    parts = [network.features(x.to(device)).cpu().double() for x in batching.split(pixels, "features")]
    return torch.cat(parts)


def log_probabilities(logits: Tensor) -> Tensor:
    """(B, C') logits → log-probabilities; one output alone is a sigmoid's. A row that is not finite is all NaN."""
    single = logits.shape[1] == 1
    scores = logits if logits.is_floating_point() else logits.float()
    found = F.pad(scores, (0, int(single))).log_softmax(1)[:, : logits.shape[1]]
    return found.masked_fill(~finite_rows(logits)[:, None], math.nan)


def finite_rows(values: Tensor) -> Tensor:
    """(N, …) → (N,): whether all values of a row are finite."""
    return values.flatten(1).isfinite().all(1)


def log_odds(logits: Tensor, outputs: Tensor) -> Tensor:
    """(B, C') logits and one output each (B,) → (B,): its log p/(1 − p). FloatingPointError unless all are finite.

    The gradient has the same direction as that of log p, but it does not vanish where rounding makes 1 − p zero. An
    adversary could silence log p: it is enough to multiply the last layer by a constant, which changes no decision.
    """
    if not bool(logits.isfinite().all()):
        raise FloatingPointError("its outputs are not finite for some images")
    scores = F.pad(logits, (0, int(logits.shape[1] == 1)))  # (B, C') or (B, 2)
    rest = scores.scatter(1, outputs[:, None], -math.inf).logsumexp(1)  # (B,)
    return scores.gather(1, outputs[:, None])[:, 0] - rest


@torch.no_grad()
def log_answers(network: Network, pixels: Tensor, batching: Batching) -> Tensor:
    """(N, 3, H, W) in [0, 1] → log-probabilities (N, C')."""
    device = network.device
    parts = [log_probabilities(network(x.to(device)).cpu().double()) for x in batching.split(pixels, "answers")]
    return torch.cat(parts)


def ask(network: Network, reference: Reference, batching: Batching) -> tuple[Suspect, Reference]:
    """Show a suspect the reference's images; returns the reference without those for which it is not finite.

    Such images are left out, which depends on the suspect alone. Otherwise a suspect that overflows on one public image
    could not be tested. FloatingPointError if they are more than half.
    """
    answers = log_answers(network, reference.pixels, batching)  # (N, C')
    psi = None if network.head is None else features(network, reference.pixels, batching)  # (N, k)
    for what, values in (("outputs", answers), ("features", psi)):
        broken = 0 if values is None else int((~finite_rows(values)).sum())
        if broken > LEFT_OUT * len(answers):
            raise FloatingPointError(f"its {what} are not finite for {broken} of {len(answers)} images")
    usable = finite_rows(answers) if psi is None else finite_rows(answers) & finite_rows(psi)
    if bool(usable.all()):
        return Suspect(network, answers, psi), reference
    return Suspect(network, answers[usable], None if psi is None else psi[usable]), reference.only(usable)


# ---------------------------------------------------------------- alignment (section 4.4)


def ridge_regression(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """M (d, k) with y ≈ x·M, for x (N, d), y (N, k); `penalty` is relative to the mean diagonal of the Gram matrix."""
    gram = x.T @ x  # (d, d)
    gram.diagonal().add_(penalty * float(gram.diagonal().mean()) + 1e-12)
    solution: Tensor = torch.linalg.solve(gram, x.T @ y)
    return solution


def aligned_rows(phi: Tensor, psi: Tensor, weight: Tensor, ridge: float) -> tuple[Tensor, float]:
    """The suspect's class weights aligned with the feature space of φ: w_c = M·W_c with ψ ≈ φ·M (section 4.4).

    phi (N, d), psi (N, k), weight (C, k). `ridge` is relative to the mean diagonal of the Gram matrix; 0 means the
    paper's least squares (with minimum norm, so that rank-deficient features do no harm). Returns (C, d) and R² of the
    fit.
    """
    matrix = ridge_regression(phi, psi, ridge) if ridge else torch.linalg.lstsq(phi, psi, driver="gelsd").solution
    spread = float((psi - psi.mean(0)).square().sum())
    r2 = 1 - float((psi - phi @ matrix).square().sum()) / spread if spread > 0 else 0.0
    return weight @ matrix.T, r2


# ---------------------------------------------------------------- gradients


def gradient_responses(
    marker: Network, network: nn.Module, outputs: Sequence[int], probes: Probes, batching: Batching
) -> GradientResponse:
    """The directions in which images of each class move along the network's gradient, in both spaces.

    With g = ∇_x `log_odds` of class c, and means over the probes x of class c: the response is
    r_c = mean of J_φ(x)·g / ‖J_φ(x)·g‖; the pattern is the mean of g / ‖g‖ in the space of the patterns, with the
    covariance of its terms. Images of other classes, asked for c, give a mean of their own: a network that has learnt a
    mark adds it to any image. Both means count the same. The network needs no alignment, no linear head, no features.
    """
    column, count = torch.tensor(list(outputs)), len(outputs)
    kind = probes.asked.clone()  # (N', q): 0 to C − 1 for images of the class, then of the others
    kind[:, 1:] += count
    directions, pattern_parts = torch.zeros(2 * count, marker.dimension, dtype=torch.float64), []
    with _forward_mode():
        for rows in batching.split(torch.arange(len(probes.places)), "gradients"):
            asked = column[probes.asked[rows]]  # (B, q)
            direction, part = _gradients(marker, network, probes.pixels[probes.places[rows]], asked)
            directions.index_add_(0, kind[rows].flatten(), F.normalize(direction.flatten(0, 1), dim=1))
            pattern_parts.append(part.flatten(0, 1))  # (B · q, m)
    parts, kind = torch.cat(pattern_parts), kind.flatten()  # (N' · q, m)
    patterns = parts.new_zeros(2 * count, PATTERN_DIMENSION).index_add_(0, kind, parts)
    number = torch.bincount(kind, minlength=2 * count).clamp_min(1)[:, None]  # (2C, 1)
    deviations = parts - (patterns / number)[kind]
    scatter = deviations.T @ deviations / len(deviations)
    if probes.asked.shape[1] == 1:
        return GradientResponse((directions / number)[:count], (patterns / number)[:count], scatter)
    return GradientResponse(_of_both(directions), _of_both(patterns), scatter)


def _of_both(sums: Tensor) -> Tensor:
    """(2C, d) sums over a class's images and over the others → (C, d): the two directions together."""
    own, others = F.normalize(sums, dim=1).chunk(2)
    return own + others


def _gradients(marker: Network, network: nn.Module, pixels: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Unit gradients of one batch (B, 3, H, W) for outputs (B, q): how φ moves along them, and in the patterns' space.

    Returns (B, q, d) and (B, q, m).
    """
    x = pixels.to(marker.device).requires_grad_()
    logits, found = network(x), []
    if not logits.requires_grad:
        raise RadiotagError("its answers have no gradient", "test it by its answers: --black-box --data DIR")
    columns = outputs.to(marker.device).T  # (q, B)
    for number, column in enumerate(columns, 1):
        odds = log_odds(logits, column)  # (B,)
        (g,) = torch.autograd.grad(odds.sum(), x, retain_graph=number < len(columns))
        g = torch.nan_to_num(g, 0.0, 0.0, 0.0)  # an overflowing gradient has no usable direction
        g = g / g.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-30)  # its square might underflow
        g = g / g.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, 1, 1, 1)
        direction = torch.func.jvp(marker.features, (x.detach(),), (g,))[1]  # (B, d)
        found.append((direction.detach().cpu().double(), pattern_coefficients(g)))
    directions, patterns = (torch.stack(parts, 1) for parts in zip(*found, strict=True))
    return directions, patterns


def top_images_per_class(log_probabilities: Tensor, outputs: Sequence[int], count: int) -> Tensor:
    """(C, count) positions of the images with the suspect's highest log-probabilities (N, C') for each class.

    Among images without labels, these give the strongest responses. The choice depends on the suspect alone.
    """
    return log_probabilities[:, list(outputs)].topk(min(count, len(log_probabilities)), dim=0).indices.T


def images_per_class(classes: int, size: int) -> int:
    """Number of images per class without labels; fewer for many classes and for large images (`size` in pixels)."""
    few = min(FEW_IMAGES, MANY_IMAGES // classes) if size <= SMALL_IMAGE else 0
    return max(8, few, min(TOP_IMAGES, GRADIENTS // classes))


def photographs_per_class(classes: int) -> int:
    """How many photographs without labels are asked for each class.

    >>> [photographs_per_class(classes) for classes in (1, 10, 100, 1000)]
    [300, 30, 8, 1]
    """
    return max(1, min(MOST_PHOTOGRAPHS, max(FEW_PHOTOGRAPHS, OF_EACH * classes)) // classes)


def choose_probes(reference: Reference, suspect: Suspect, classes: ComparedClasses) -> Probes:
    """The labelled images of the compared classes; without labels, `top_images_per_class`.

    With `others`, each image is also asked for one other class, the classes in turn. With `few`, of photographs without
    labels `photographs_per_class` are asked.
    """
    count, size = len(classes.outputs), reference.pixels.shape[3]
    if classes.labels is not None:
        labels = torch.tensor(classes.labels)
        places = torch.nonzero(labels >= 0)[:, 0]
        labels = labels[places]
    else:
        few = classes.few and size > SMALL_IMAGE
        each = photographs_per_class(count) if few else images_per_class(count, size)
        top = top_images_per_class(suspect.log_probabilities, classes.outputs, each)  # (C, n)
        places, labels = top.flatten(), torch.arange(len(top)).repeat_interleave(top.shape[1])
    if not classes.others or count < 2:
        return Probes(reference.pixels, places, labels[:, None])
    return Probes(reference.pixels, places, torch.stack([labels, _other_classes(labels, count)], 1))


def _other_classes(labels: Tensor, classes: int) -> Tensor:
    """(N,) labels → (N,): another class for each, so that each class's images are asked for all others in turn."""
    other, turn = torch.empty_like(labels), torch.arange(len(labels))
    for c in range(classes):
        mine = labels == c
        other[mine] = (c + 1 + turn[: int(mine.sum())] % (classes - 1)) % classes
    return other


# ---------------------------------------------------------------- what any network would answer


class LinearProbe(nn.Module):
    """A linear classifier on the features φ, with class weights `rows` (K, d). It has seen no mark."""

    def __init__(self, marker: Network, rows: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.marker, self.rows, self.bias = marker, rows, bias

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] → logits (B, K)."""
        phi = self.marker.features(pixels)  # (B, d)
        return F.linear(phi, self.rows.to(phi), None if self.bias is None else self.bias.to(phi))


@torch.no_grad()
def restricted_marker(marker: Network, outputs: Sequence[int]) -> tuple[LinearProbe, Tensor]:
    """The marking network restricted to some of its outputs, and its class weights (K, d) for them.

    The suspect has mostly not learnt what separates these classes from the marking network's other classes.
    """
    head = marker.head
    assert head is not None
    rows = head.weight[list(outputs)]
    rows = rows - rows.mean(0)  # the softmax does not depend on the mean
    bias = None if head.bias is None else head.bias[list(outputs)]
    return LinearProbe(marker, rows, bias), rows.cpu().double()


@torch.no_grad()
def regression_rows(phi: Tensor, targets: Tensor) -> Tensor:
    """Class weights (C, d) by ridge regression of targets (N, C) on features phi (N, d), both centred here."""
    return ridge_regression(phi - phi.mean(0), targets - targets.mean(0), RIDGE_REFERENCE).T


def _with_no_class(rows: Tensor) -> Tensor:
    """(C, d) → (C + 1, d): adds an output that is always zero and means "none of the classes"."""
    return F.pad(rows, (0, 0, 0, 1))


def reference_classifier(
    reference: Reference, suspect: Suspect, classes: ComparedClasses, batching: Batching
) -> ReferenceClassifier:
    """A classifier of the compared classes that has never seen a mark.

    If the marking network knows the classes, it is the reference classifier. Its class weights are restricted to these
    classes and the further ones that the suspect knows. Without labels its outputs are restricted, too: on images of
    none of the classes they would mostly separate these classes from others that the suspect has never seen.
    Otherwise the reference classifier is a linear probe on the features φ. It is fitted to the labels, or, if there are
    none or all are of one class, to the suspect's probabilities. In the latter case `rows` is None: if a suspect's
    features are φ itself, these class weights contain everything that it has learnt.
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
    """The marking network, which knows the compared classes: whole, or restricted to those that the suspect knows."""
    marker_outputs = classes.marker_outputs
    assert marker_outputs is not None and marker.head is not None
    if len(marker_outputs) + len(classes.marker_besides) == 1:
        return ReferenceClassifier(marker, marker_outputs, marker.head.weight.cpu().double()[list(marker_outputs)])
    probe, rows = restricted_marker(marker, (*marker_outputs, *classes.marker_besides))
    rows = rows[: len(marker_outputs)]
    if classes.labels is None:
        return ReferenceClassifier(probe, tuple(range(len(marker_outputs))), rows)
    return ReferenceClassifier(marker, marker_outputs, rows)


# ---------------------------------------------------------------- class vectors


def center_over_classes(rows: Tensor) -> Tensor:
    """Rows (C, d) minus (1 − 2/C) times their mean: any network shows most of what all classes share.

    With few classes less is removed, because much of their mean comes from the mark of each single class. Rows of zeros
    stay zero and do not count in C.
    """
    alive = rows.any(dim=1, keepdim=True)  # (C, 1)
    count = max(2, int(alive.sum()))
    shared: Tensor = alive * rows.sum(0) * (1 - 2 / count) / count
    return rows - shared


def whitening(scatter: Tensor) -> Tensor:
    """(S/s + I)^(−½), (m, m), for a covariance S of mean variance s: directions that vary between images count less.

    A network's gradients are largest in the directions in which natural images vary, and that is noise here. S is
    computed from the suspect alone.
    """
    mean = float(scatter.diagonal().mean())  # the terms are at most unit vectors: below 1e-12 this is rounding error
    values, vectors = torch.linalg.eigh(scatter / max(mean, 1e-12))
    root: Tensor = (vectors * (values.clamp_min(0) + 1).rsqrt()) @ vectors.T
    return root


def remove_projection(rows: Tensor, directions: Tensor) -> Tensor:
    """Rows (C, d) minus their projection onto the same row of `directions` (C, d)."""
    units = F.normalize(directions, dim=1)
    remainder: Tensor = rows - (rows * units).sum(1, keepdim=True) * units
    return remainder


def class_vectors(
    reference: Reference, suspect: Suspect, classes: ComparedClasses, batching: Batching | None = None
) -> ClassVectors:
    """The vectors of the declared statistic and of the paper's, one row per compared output.

    The alignment uses all images, the response only the probes (`choose_probes`). The part that the classes share is
    removed (`center_over_classes`), the pattern is whitened, and the response of a reference classifier is removed
    class by class. FloatingPointError if the suspect's outputs are not finite, RadiotagError if they have no gradient.
    """
    batching = batching or Batching()
    classifier = reference_classifier(reference, suspect, classes, batching)
    probes = choose_probes(reference, suspect, classes)
    raw = gradient_responses(reference.marker, suspect.network, classes.outputs, probes, batching)
    baseline = reference.responses(classifier, classes, probes, batching)
    whitener = whitening(raw.scatter)
    pattern = remove_projection(
        center_over_classes(raw.pattern) @ whitener, center_over_classes(baseline.pattern) @ whitener
    )  # (C, m)
    response = remove_projection(center_over_classes(raw.response), center_over_classes(baseline.response))
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
    """The last layer's rows in the space of φ: by ridge regression, centred; by least squares; R² of the latter."""
    network, psi, phi = suspect.network, suspect.features, reference.features(batching)
    assert network.head is not None and psi is not None
    weight = network.head.weight.cpu().double()[list(classes.outputs)]  # (C, k)
    paper, r2 = aligned_rows(phi, psi, weight, 0.0)
    penalty = (RIDGE_UNLABELLED if classes.labels is None else RIDGE_LABELLED)[0]
    return center_over_classes(aligned_rows(phi, psi, weight, penalty)[0]), paper, r2
