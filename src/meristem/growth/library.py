"""A library of blueprints and trained seeds, which models of the same width can take from each other (growth.md 23).

with grow.Library("seeds") as library:
    library.put_blueprint("small", "low_rank", rank=4)
    library.put_seed("arithmetic", model, "blocks.1")
    library.certify("arithmetic", other, "blocks.3")
    library.gather_reports("runs/arithmetic/growth.log")
    grow.graft_from(other, "blocks.3", library.load("arithmetic"))
    grow.set_blend(other, "blocks.3", 1.0, steps=100)

What is stored are plain values and tensors: no code, and nothing that is unpickled. A stored seed names what it is
built from, and is built by the blueprint of that name and version that this meristem has.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Any, Final, Literal, Self, TypeAlias, cast, get_args

from torch import Tensor, nn

from meristem.checkpoint.catalog import Catalog
from meristem.errors import CertificateRefused, CheckpointCorrupt, ShapeError, WrongValue
from meristem.events import Emit, silent
from meristem.growth.attach import find_slot
from meristem.growth.certify import Certificate, Handling, certify
from meristem.growth.course import Course
from meristem.growth.graft import build, find_seed, graft
from meristem.growth.report import GrowthReport, read
from meristem.growth.seed import Origin, Seed
from meristem.growth.settle import settled_in
from meristem.growth.weights import STATE, packed, unpacked
from meristem.nn.slot import Reads

Trust: TypeAlias = Literal["safe", "experimental", "high_risk"]
"""How far a blueprint or seed is trusted: taken without a word, when it is allowed, or in a run of its own."""

TRUST: Final = get_args(Trust)
TRUSTED: Final[Mapping[Handling, Trust]] = {
    "standard": "safe",
    "restricted": "experimental",
    "quarantine": "high_risk",
}
"""What a certificate says of trust."""


@dataclass(frozen=True)
class Fitting:
    """What a slot has to be for stored weights, and where they come from.

    reads, widths: those of the slot. slot, blend_weight: where the seed stood, and how far it was blended in.
    """

    reads: Reads
    widths: tuple[int, int]
    slot: str
    blend_weight: float
    n_parameters: int

    @classmethod
    def of(cls, seed: Seed, reads: Reads, widths: tuple[int, int]) -> Self:
        return cls(reads, widths, seed.slot, seed.way.weight, sum(each.numel() for each in seed.parameters()))


@dataclass(frozen=True)
class Card:
    """What a library knows of one version of a name. created: seconds since 1970.

    handling: what the newest certificate of this version says, None without one. sha256: of the file of its weights,
    None of a blueprint, which is built anew.
    """

    name: str
    version: int
    origin: Origin
    trust: Trust
    created: float
    handling: Handling | None = None
    sha256: str | None = None
    size_bytes: int = 0
    fitting: Fitting | None = None

    @property
    def risk(self) -> Trust:
        """The lesser of its trust and of what its certificate says."""
        said = [self.trust] if self.handling is None else [self.trust, TRUSTED[self.handling]]
        return max(said, key=TRUST.index)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        fitting = self.fitting and {**vars(self.fitting), "widths": [*self.fitting.widths]}
        return {**vars(self), "origin": _plain(self.origin), "fitting": fitting, "risk": self.risk}

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        """Of what the catalog gives."""
        weights = row["weights"] or {"sha256": None, "size_bytes": 0, "fitting": None}
        fitting = weights["fitting"]
        return cls(
            **{name: row[name] for name in ("name", "version", "trust", "created", "handling")},
            origin=Origin(**row["origin"]),
            sha256=weights["sha256"],
            size_bytes=weights["size_bytes"],
            fitting=Fitting(**{**fitting, "widths": tuple(fitting["widths"])}) if fitting else None,
        )


@dataclass(frozen=True)
class Artifact:
    """What ``graft_from`` takes: a card, and the tensors of a trained seed by name, which nobody may change."""

    card: Card
    tensors: Mapping[str, Tensor]


class Library:
    """The open library in a directory, which is made where there is none, unless ``is_there`` says that there is one.
    Threads and processes may share it.

    Raises CheckpointCorrupt for a file that is broken or of another program, CheckpointTooNew for one that a later
    meristem made, RunError for a place that cannot be used.
    """

    def __init__(
        self,
        place: str | Path,
        *,
        is_there: bool = False,
        clock: Callable[[], float] = time,
        emit: Emit = silent,
    ) -> None:
        self.place = Path(place)
        self._catalog = Catalog(place, is_there=is_there, clock=clock, emit=emit)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._catalog.close()

    def put_blueprint(
        self, name: str, blueprint: str, *, blend: str = "residual", trust: Trust = "safe", **settings: Any
    ) -> Card:
        """Store a blueprint with settings under a name: a new version, unless the newest says the same.

        Raises what ``graft`` raises for a blueprint, blend or settings that are none.
        """
        origin = Origin.of(blueprint, settings, blend=blend, random_seed=0)
        version = self._catalog.put(name, origin=_plain(origin), trust=trusted(trust))
        return self.card(name, version)

    def put_seed(self, name: str, model: nn.Module, slot: str, *, trust: Trust = "experimental") -> Card:
        """Store the seed in a slot, or else the one that settled there last, with its weights; the model is only read.

        The weights are a safetensors file; its SHA-256 is in the card. Raises WrongValue for a slot that is not there
        or empty, DiskFull where there is no room: nothing is stored then.
        """
        place, settled = find_slot(model, slot), settled_in(model).get(slot, [])
        seed = settled[-1] if place.seed is None and settled else find_seed(model, slot)
        fitting = Fitting.of(seed, place.reads, place.widths)
        weights = {"content": packed(seed), "fitting": {**vars(fitting), "widths": [*fitting.widths]}}
        version = self._catalog.put(name, origin=_plain(seed.origin), trust=trusted(trust), weights=weights)
        return self.card(name, version)

    def card(self, name: str, version: int | None = None) -> Card:
        """What is known of a version, by default of the newest. Raises WrongValue with the nearest names."""
        return Card.of(self._catalog.card(name, version))

    def search(
        self, *, blueprint: str | None = None, width: int | None = None, allow: Trust = "high_risk"
    ) -> list[Card]:
        """The newest version of every name, by name.

        blueprint: only those built from it. width: only those that can add to a slot of that width. allow: the least
        trust that is listed.
        """
        found = [Card.of(row) for row in self._catalog.cards()]
        return [
            card
            for card in found
            if blueprint in (None, card.origin.blueprint)
            and (width is None or card.fitting is None or card.fitting.widths[1] == width)
            and TRUST.index(card.risk) <= TRUST.index(trusted(allow))
        ]

    def load(self, name: str, version: int | None = None) -> Artifact:
        """A card with its tensors, on the CPU. Raises CheckpointCorrupt unless the file is the one that was stored."""
        row = self._catalog.card(name, version)
        return Artifact(Card.of(row), unpacked(self._catalog.content(row), name) if row["weights"] else {})

    def retire(self, name: str) -> None:
        """Take a name out of what is listed and given; its rows and files stay."""
        self._catalog.retire(name)

    def changes(self, since: int = 0) -> tuple[int, list[dict[str, Any]]]:
        """Where the feed of changes stands, and the changes after ``since``: seq, kind, name and version of each."""
        return self._catalog.changes(since)

    def certify(self, name: str, model: nn.Module, slot: str, **settings: Any) -> Certificate:
        """Probe what a name holds in a copy of a slot, and append the certificate and the speed to what is known of it.

        settings: those of ``growth.certify``. Raises what ``seed_for`` raises for a slot that does not fit.
        """
        artifact = self.load(name)
        found = certify(model, slot, seed_for(model, slot, artifact), **settings)
        self._catalog.certify(name, artifact.card.version, found.to_json())
        return found

    def certificates(self, name: str | None = None) -> list[Certificate]:
        """Certificates of a name or of all, oldest first. Raises CheckpointCorrupt where one was altered or removed."""
        return [Certificate.from_json(row["evidence"]) for row in self._catalog.certificates(name)]

    def benchmarks(self, name: str) -> list[dict[str, Any]]:
        """What seeds of a name were measured at, oldest first: device, dtype, shape, ms, tokens per second, bytes."""
        return self._catalog.benchmarks(name)

    def gather_reports(self, log: str | Path, *, since: str = "", emit: Emit = silent) -> int:
        """Store the reports of the log of a run (``growth.log``) that are not there yet, and how many those are.

        since: only those issued then or later, in UTC, ISO 8601. One that was written again takes the place of the
        first.
        """
        reports = read(Path(log), emit)
        return sum(self._catalog.report(each.to_json()) for each in reports if each.issued_at >= since)

    def reports(self, blueprint: str | None = None) -> list[GrowthReport]:
        """Reports of a blueprint or of all, by the time at which they were issued."""
        return [GrowthReport.from_json(each) for each in self._catalog.reports(blueprint)]


def graft_from(
    model: nn.Module, slot: str, artifact: Artifact, *, allow: Trust = "experimental", emit: Emit = silent
) -> Seed:
    """Put what a library gave into an empty slot of a model; the model computes what it did.

    A trained seed comes with the blend weight 0: the host is untouched to the bit until ``set_blend`` blends it in.
    One of a blueprint alone is new and adds zero, as with ``graft``. allow: the least trust that is taken, of the card
    and of its newest certificate.

    Raises CertificateRefused below that, ShapeError for a slot of another width, WrongValue for one that reads the
    other end or is not empty, CheckpointMismatch for weights of another version of the blueprint, or with other
    tensors; the model is untouched then. The event is ``graft.done``.
    """
    card = artifact.card
    if TRUST.index(card.risk) > TRUST.index(trusted(allow)):
        said = f", and its certificate says '{card.handling}'" if card.handling else ""
        raise CertificateRefused(
            f"'{card.name}', version {card.version}, has the trust '{card.trust}'{said}; expected '{allow}' or more. "
            f"Take another, or pass allow='{card.risk}' in a run that may fail.",
            name=card.name,
            found=card.risk,
            expected=allow,
        )
    return graft(model, slot, seed_for(model, slot, artifact), emit=emit)


def seed_for(model: nn.Module, slot: str, artifact: Artifact) -> Seed:
    """The seed that ``graft_from`` would put into a slot, not in it yet: for ``certify``."""
    place, card = find_slot(model, slot), artifact.card
    needed = card.fitting
    if needed and (needed.widths != place.widths or needed.reads != place.reads):
        what = ShapeError if needed.widths != place.widths else WrongValue
        raise what(
            f"the seed '{card.name}' reads the {needed.reads} of the width {needed.widths[0]} and adds to "
            f"{needed.widths[1]}; slot '{slot}' gives its {place.reads} of {place.widths[0]} and takes "
            f"{place.widths[1]}. Choose a slot that fits, or train a seed there.",
            found=place.widths,
            expected=needed.widths,
        )
    seed = build(model, place, card.origin)
    if needed is None:
        return seed
    expected = {name for name in seed.state_dict() if name not in STATE}
    try:
        if expected != artifact.tensors.keys():
            raise RuntimeError(f"{len(artifact.tensors)} tensors for {len(expected)} of the blueprint")
        seed.load_state_dict(dict(artifact.tensors), strict=False)
    except RuntimeError as cause:
        raise CheckpointCorrupt(
            f"the weights of '{card.name}', version {card.version}, are not those of a '{card.origin.blueprint}': "
            f"{str(cause).splitlines()[-1].strip()}. Store the seed again.",
            name=card.name,
        ) from cause
    seed.follow(Course(0.0, 0.0))
    return seed


def _plain(origin: Origin) -> dict[str, Any]:
    return {**vars(origin), "settings": dict(origin.settings)}


def trusted(trust: str) -> Trust:
    """That word as a trust. Raises WrongValue for any other."""
    if trust not in TRUST:
        raise WrongValue(f"the trust '{trust}' was found; expected one of {', '.join(TRUST)}.", value=trust)
    return cast(Trust, trust)
