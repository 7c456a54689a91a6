"""Which engine holds which shipment of weights, and whether it may sample with what it holds.

Owns three facts: the session in which weights are sent (its epoch, its members and their ranks), the shipment that each engine must
hold now, and the one that each is known to hold. Pure: it is told facts and asked for decisions, and owns no handle and no task. Fails
closed: a shipment counts as held from the moment at which what the engine attested equals what the sender sent, and no earlier.
Does not know how weights travel (`session`, `sender`), or who is alive (`rlhf.cluster.lives`): it is told. Told and asked by `RolloutPool`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

from rlhf.cluster.lives import Member
from rlhf.types import DATASET_VERSION, ModelSlot, Shipment, Span

Checksums = Mapping[ModelSlot, tuple[str, ...]]
"""Of each slot's weights as each worker holds them (`rlhf.engines.slots`); empty for an engine that does not mix."""


class StaleWeights(RuntimeError):
    """Some engine does not hold the weights that the policy published."""


@dataclass(frozen=True)
class Attestation:
    """An engine's word for the weights it now holds.

    Attributes:
        version: of the policy's weights. A new partner does not change it.
        fingerprint: of the bytes as its workers received them (`rlhf.transfer.fingerprint`).
        held: except of a slot whose last transfer failed.
    """

    engine: int
    version: int
    fingerprint: str
    held: Checksums = field(default_factory=dict)


@dataclass(frozen=True)
class Membership:
    """Who takes part in a session.

    Attributes:
        epoch: of the session; each one's is larger than that of the one before.
        offsets: rank of each engine's first worker. Rank 0 is the sender.
        world_size: the sender, and all workers.
    """

    epoch: int
    offsets: Mapping[Member, int]
    world_size: int


class Versions:
    """The weights of a pool's engines. Those that an engine has loaded from the model's files are version 0."""

    def __init__(self, engines: Mapping[Member, Checksums]):
        """
        Args:
            engines: those that have started.
        """
        mixes = any("partner" in checksums for checksums in engines.values())
        self.slots: tuple[ModelSlot, ...] = get_args(ModelSlot) if mixes else ("policy",)
        self.version = 0  # of the policy's weights that were accepted last
        self.publishing = False  # weights are under way, and neither accepted nor refused
        self.shipments = self.failures = 0  # those that were sent, and those of them that were not accepted
        self._accepted = {0}  # versions of the policy
        self._wanted = dict.fromkeys(
            self.slots, 0
        )  # slot -> number of the shipment that must be held; 0: the model's files
        self._held: dict[Member, dict[ModelSlot, int]] = {}  # without an entry a slot is in doubt
        self._checksums: dict[Member, Checksums] = {}
        self._membership = Membership(0, {}, 1)
        self._whole = False  # all have joined, and no transfer has failed
        self._shipment: Shipment | None = None  # the last one that was sent in this session
        self._sending = False
        self._attested: dict[Member, Attestation] = {}
        for member, checksums in engines.items():
            self.started(member, checksums)

    # Facts

    def started(self, member: Member, checksums: Checksums) -> None:
        """An engine has loaded the model's files. It is in no session yet."""
        self._held[member] = dict.fromkeys(self.slots, 0)
        self._checksums[member] = checksums

    def died(self, member: Member) -> None:
        """An engine is gone, and its weights with it. The session cannot go on without it."""
        self._held.pop(member, None)
        self._checksums.pop(member, None)
        self._attested.pop(member, None)

    def joined(self, epoch: int) -> None:
        """All members of the session have joined. Of an earlier epoch this is no news."""
        self._whole |= epoch == self._membership.epoch

    def shipping(self, shipment: Shipment) -> None:
        """Weights are about to be sent: from now on no engine is known to hold them, and a transfer that fails costs the session.

        Raises:
            StaleWeights: not all living engines are in the session, or it broke: open a new one. Nothing may be sent.
            ValueError: the engines have no such slot.
        """
        if shipment.slot not in self.slots:
            raise ValueError(
                f"weights were sent for the {shipment.slot}, but the engines hold none: start the pool with mixes"
            )
        joined = self._in_session()
        self._end_shipment()
        self.shipments += 1
        self._wanted[shipment.slot] = self.shipments
        self._doubt(self._held, shipment.slot)
        if not joined or joined != self._held.keys():
            raise StaleWeights(
                f"the weight-transfer session joins engines {_places(joined)}, but {_places(self._held)} are alive: "
                "open a new session and call pool.connect (also after a failed transfer)."
            )
        self._shipment, self._sending, self.publishing = shipment, True, True

    def broke_off(self) -> None:
        """The transfer has failed. Engines may hold anything, and what they were writing does not count."""
        self.failures += self.publishing
        self.publishing = False

    def attested(self, attestations: Mapping[Member, Attestation]) -> None:
        """The transfer has ended; these engines say that they have received the shipment.

        Raises:
            ValueError: nothing was being sent in this session.
        """
        if not self._sending:
            raise ValueError("weights were attested, and none were being sent")
        self._sending = False
        members = self._membership.offsets.keys()
        self._attested = {
            member: word for member, word in attestations.items() if member in members & self._held.keys()
        }
        self._whole = attestations.keys() == members

    def lost(self, members: Collection[Member]) -> None:
        """These engines have dropped all their weights (sleep at level 2)."""
        for member in members:
            self._attested.pop(member, None)
        for slot in self.slots:
            self._doubt(members, slot)

    # Decisions

    def reopen(self, workers: Mapping[Member, int]) -> Membership:
        """Who takes part in a new session, under a new epoch; the one before it is over.

        Args:
            workers: of each living engine.
        """
        offsets, rank = {}, 1
        for member in sorted(workers):
            offsets[member] = rank
            rank += workers[member]
        self._end_shipment()
        self._membership = Membership(self._membership.epoch + 1, offsets, rank)
        return self._membership

    def membership(self, epoch: int) -> Membership:
        """Of the session with this epoch.

        Raises:
            StaleWeights: it is not the newest.
        """
        if epoch != self._membership.epoch:
            raise StaleWeights(
                f"the weight-transfer session of epoch {epoch} is over: the newest one's is {self._membership.epoch}"
            )
        return self._membership

    def accept(self, shipment: Shipment, fingerprint: str) -> None:
        """Compare what the engines attested with what the sender sent: only then do they hold it.

        Args:
            fingerprint: of what was sent.

        Raises:
            StaleWeights: an engine holds other weights, or has not attested, or those of the other slot have changed.
        """
        self.publishing = True
        try:
            self._require_attested(shipment, fingerprint)
        except StaleWeights:
            self.broke_off()
            raise
        for member, attestation in self._attested.items():
            self._held[member][shipment.slot] = self._wanted[shipment.slot]
            self._checksums[member] = attestation.held
        self.version, self.publishing = shipment.version, False
        self._accepted.add(shipment.version)

    def _require_attested(self, shipment: Shipment, fingerprint: str) -> None:
        for slot in {shipment.slot} if self._shipment is None else {shipment.slot, self._shipment.slot}:
            self._doubt(self._held, slot)
        sent = (shipment.version, fingerprint)
        wrong = [word for word in self._attested.values() if (word.version, word.fingerprint) != sent]
        if wrong or shipment != self._shipment or self._attested.keys() != self._held.keys():
            seen = ", ".join(
                f"engine {a.engine}: version {a.version}, {a.fingerprint}" for a in self._attested.values()
            )
            raise StaleWeights(
                f"the weights of the {shipment.slot} were sent with fingerprint {fingerprint} at version {shipment.version}, "
                f"but the engines attest {seen or 'nothing'}"
            )
        for member, attestation in self._attested.items():
            self._require_others_kept(member, attestation, shipment.slot)

    def may_sample(self, member: Member) -> bool:
        """Whether this engine holds, in each slot, the weights that were sent last."""
        return self._held.get(member) == self._wanted

    def require_accepted(self, spans: Sequence[Span], begun: int) -> None:
        """Make sure that only weights which were accepted have written a response, the newer ones after the older ones. How old they may be
        is not asked.

        Args:
            begun: version of the policy's weights when the response was asked for.

        Raises:
            StaleWeights: other weights have written some of it.
        """
        written = [span.version for span in spans if span.version != DATASET_VERSION]
        accepted = all(begun <= version <= self.version and version in self._accepted for version in written)
        if not accepted or written != sorted(written):
            raise StaleWeights(
                f"a response was written with the weight versions {written}, one after the other, but it was begun at version {begun}, the "
                f"policy is at {self.version}, and only weights that were accepted may write, older ones before newer ones"
            )

    def missing(self) -> tuple[ModelSlot, ...]:
        """Slots that must be sent before all engines may sample, the policy first."""
        return tuple(
            slot for slot in self.slots if any(held.get(slot) != self._wanted[slot] for held in self._held.values())
        )

    def checksums(self, member: Member) -> Checksums:
        """What this engine has attested of its slots."""
        return self._checksums[member]

    def _in_session(self) -> set[Member]:
        """Members of a session that can still be used."""
        return set(self._membership.offsets) if self._whole else set()

    def _end_shipment(self) -> None:
        """Until it is known to have arrived, or a new session is joined, the session is not whole."""
        self.broke_off()
        self._shipment, self._sending, self._attested, self._whole = None, False, {}, False

    def _doubt(self, members: Collection[Member], slot: ModelSlot) -> None:
        for member in members:
            self._held.get(member, {}).pop(slot, None)

    def _require_others_kept(self, member: Member, attestation: Attestation, sent: ModelSlot) -> None:
        for slot in self._held[member]:  # the slot that was sent is in doubt, so it is not among them
            if attestation.held.get(slot) != self._checksums[member].get(slot):
                raise StaleWeights(
                    f"weights were sent for the {sent}, but in engine {attestation.engine} those of the {slot} changed too"
                )


def _places(members: Collection[Member]) -> list[int]:
    return sorted(member.place for member in members)
