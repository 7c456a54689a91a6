"""Who holds which shipment: whatever happens, in whatever order, an engine that samples really holds what was sent last."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from rlhf.cluster.lives import Member
from rlhf.transfer.versions import Attestation, StaleWeights, Versions
from rlhf.types import ModelSlot, Shipment

SLOTS: tuple[ModelSlot, ...] = ("policy", "partner")
FILES, LOST = "files", "lost"


class World(RuleBasedStateMachine):
    """Real engines, that is, the bytes in them, beside what is known of them. Bytes are words here, and fingerprints too.

    Engines die and are started again, sleep, receive other bytes than were sent, spoil the slot that was not sent, or break off; sessions
    are opened without some, joined late, and used after they ended.
    """

    @initialize(engines=st.integers(1, 3), mixes=st.booleans())
    def start(self, engines: int, mixes: bool) -> None:
        self.slots = SLOTS if mixes else SLOTS[:1]
        self.bytes = {Member(place): dict.fromkeys(self.slots, FILES) for place in range(engines)}
        self.version = dict.fromkeys(self.bytes, 0)
        self.versions = Versions({member: self.checksums(member) for member in self.bytes})
        self.sent: dict[ModelSlot, str] = dict.fromkeys(self.slots, FILES)
        self.shipment: Shipment | None = None
        self.shipments = self.restarts = self.epoch = 0

    def checksums(self, member: Member) -> dict[ModelSlot, tuple[str, ...]]:
        return {slot: (held,) for slot, held in self.bytes[member].items()} if len(self.slots) == 2 else {}

    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        if len(self.bytes) > 1:
            member = data.draw(st.sampled_from(sorted(self.bytes)))
            del self.bytes[member]
            self.versions.died(member)
            assert not self.versions.may_sample(member)

    @rule(place=st.integers(0, 2))
    def start_again(self, place: int) -> None:
        if all(member.place != place for member in self.bytes):
            self.restarts += 1
            member = Member(place, self.restarts)
            self.bytes[member], self.version[member] = dict.fromkeys(self.slots, FILES), 0
            self.versions.started(member, self.checksums(member))
            assert self.versions.may_sample(member) == (set(self.sent.values()) == {FILES})

    @rule(data=st.data())
    def sleep(self, data: st.DataObject) -> None:
        members = data.draw(st.sets(st.sampled_from(sorted(self.bytes))))
        for member in members:
            self.bytes[member] = dict.fromkeys(self.slots, LOST)
        self.versions.lost(members)
        assert not any(self.versions.may_sample(member) for member in members)
        assert not members or self.versions.missing() == self.slots

    @rule(
        all_of_them=st.sampled_from([True, True, False]),
        join=st.sampled_from(["all", "all", "late", "never"]),
        data=st.data(),
    )
    def reopen(self, all_of_them: bool, join: str, data: st.DataObject) -> None:
        alive = sorted(self.bytes)
        some = alive if all_of_them else data.draw(st.lists(st.sampled_from(alive), unique=True))
        workers = {member: data.draw(st.integers(1, 3)) for member in some}
        membership = self.versions.reopen(workers)
        assert membership.epoch > self.epoch, "epochs only grow"
        ranks = [membership.offsets[member] + i for member in workers for i in range(workers[member])]
        assert sorted(ranks) == list(range(1, membership.world_size))
        with pytest.raises(StaleWeights, match="is over"):
            self.versions.membership(self.epoch)
        if join == "late":
            self.versions.joined(self.epoch)  # the session before
        self.epoch, self.members = membership.epoch, set(workers)
        self.usable = join == "all"
        if self.usable:
            self.versions.joined(membership.epoch)

    @rule(
        slot=st.sampled_from(SLOTS),
        trouble=st.sampled_from(["none", "none", "breaks off", "other bytes", "old version", "spoils the other slot"]),
        data=st.data(),
    )
    def ship(self, slot: ModelSlot, trouble: str, data: st.DataObject) -> None:
        self.shipments += 1
        shipment = Shipment(self.shipments, slot, ())
        if slot not in self.slots:
            with pytest.raises(ValueError, match="start the pool with mixes"):
                self.versions.shipping(shipment)
            return
        self.sent[slot] = f"bytes {self.shipments}"
        ready = self.epoch > 0 and self.usable and self.members == self.bytes.keys()
        if not ready:
            self.shipment, self.usable = None, False
            with pytest.raises(StaleWeights, match="open a new session"):
                self.versions.shipping(shipment)
            with pytest.raises(ValueError, match="none were being sent"):
                self.versions.attested({})
            return
        self.versions.shipping(shipment)
        assert not any(self.versions.may_sample(member) for member in self.bytes)
        self.shipment, self.usable = shipment, False
        victim = data.draw(st.sampled_from(sorted(self.bytes)))
        for member in self.bytes:
            self.bytes[member][slot] = self.sent[slot]
            self.version[member] = shipment.version
        if trouble == "breaks off":
            self.bytes[victim][slot] = LOST
            return
        if trouble == "other bytes":
            self.bytes[victim][slot] = "other bytes"
        elif trouble == "old version":
            self.version[victim] -= 1
        elif trouble == "spoils the other slot":
            self.bytes[victim] |= dict.fromkeys(set(self.slots) - {slot}, "spoilt")
        self.versions.attested(
            {
                member: Attestation(member.place, self.version[member], held[slot], self.checksums(member))
                for member, held in self.bytes.items()
            }
        )
        self.usable = True

    @rule(wrong=st.sampled_from(["no", "no", "no", "fingerprint", "version", "slot"]))
    def accept(self, wrong: str) -> None:
        """Also a second time, also after sleep or a death."""
        if self.shipment is None:
            return
        shipment, fingerprint = self.shipment, self.sent[self.shipment.slot]
        if wrong == "fingerprint":
            fingerprint = "of something else"
        elif wrong == "version":
            shipment = Shipment(shipment.version + 1, shipment.slot, ())
        elif wrong == "slot":
            shipment = Shipment(shipment.version, SLOTS[shipment.slot == "policy"], ())
        failures = self.versions.failures
        try:
            self.versions.accept(shipment, fingerprint)
        except StaleWeights:
            assert self.versions.failures == failures + 1 and not self.versions.publishing
            if shipment.slot in self.slots:
                assert not any(self.versions.may_sample(member) for member in self.bytes)
        else:
            assert wrong == "no"
            assert self.versions.failures == failures and not self.versions.publishing
            assert self.versions.version == shipment.version

    @rule()
    def publish_what_is_missing(self) -> None:
        """Without trouble, a new session and the missing slots make every engine sample again, however it came to this."""
        membership = self.versions.reopen(dict.fromkeys(self.bytes, 1))
        self.versions.joined(membership.epoch)
        self.epoch, self.members, self.usable = membership.epoch, set(self.bytes), True
        if any("spoilt" in held.values() for held in self.bytes.values()):
            return  # whoever accepts the other slot next will notice
        self.shipments += 1
        for slot in self.versions.missing():
            shipment = Shipment(self.shipments, slot, ())
            self.sent[slot] = f"bytes {self.shipments} for the {slot}"
            self.versions.shipping(shipment)
            words = {}
            for member, held in self.bytes.items():
                held[slot], self.version[member] = self.sent[slot], self.shipments
                words[member] = Attestation(member.place, self.shipments, held[slot], self.checksums(member))
            self.versions.attested(words)
            self.versions.accept(shipment, self.sent[slot])
            self.shipment = shipment
        assert all(self.versions.may_sample(member) for member in self.bytes)
        assert self.versions.missing() == ()

    @invariant()
    def who_samples_holds_what_was_sent_last(self) -> None:
        for member in self.version:
            if self.versions.may_sample(member):
                assert self.bytes[member] == self.sent
                assert not self.versions.publishing


World.TestCase.settings = settings(max_examples=150, stateful_step_count=30)
test_whatever_happens = World.TestCase


def two_engines() -> tuple[Versions, Member, Member]:
    one, other = Member(0), Member(1)
    return Versions({one: {}, other: {}}), one, other


def test_ranks_follow_one_another_from_the_senders() -> None:
    versions, one, other = two_engines()
    membership = versions.reopen({other: 1, one: 2})
    assert (membership.epoch, membership.world_size) == (1, 4)
    assert membership.offsets == {one: 1, other: 3}
    assert versions.reopen({other: 1}).offsets == {other: 1}


def test_a_session_is_reopened_without_the_dead() -> None:
    versions, one, other = two_engines()
    versions.joined(versions.reopen({one: 1, other: 1}).epoch)
    versions.died(one)
    with pytest.raises(StaleWeights, match=r"joins engines \[0, 1\], but \[1\] are alive"):
        versions.shipping(Shipment(1, "policy", ()))
    assert versions.missing() == ("policy",)
    versions.joined(versions.reopen({other: 1}).epoch)
    shipment = Shipment(1, "policy", ())
    versions.shipping(shipment)
    versions.attested({other: Attestation(1, 1, "f")})
    versions.accept(shipment, "f")
    assert versions.may_sample(other) and not versions.may_sample(one)


def test_an_older_sessions_members_do_not_join_the_new_one() -> None:
    versions, one, other = two_engines()
    first = versions.reopen({one: 1, other: 1})
    versions.reopen({one: 1, other: 1})
    versions.joined(first.epoch)
    with pytest.raises(StaleWeights, match=r"joins engines \[\], but \[0, 1\] are alive"):
        versions.shipping(Shipment(1, "policy", ()))
    with pytest.raises(StaleWeights, match="epoch 1 is over"):
        versions.membership(first.epoch)


def test_what_was_accepted_before_a_sleep_is_not_held_after_it() -> None:
    versions, one, other = two_engines()
    versions.joined(versions.reopen({one: 1, other: 1}).epoch)
    shipment = Shipment(3, "policy", ())
    versions.shipping(shipment)
    versions.attested({member: Attestation(member.place, 3, "f") for member in (one, other)})
    versions.accept(shipment, "f")
    versions.lost([one])
    assert versions.may_sample(other) and not versions.may_sample(one)
    assert versions.missing() == ("policy",)
    with pytest.raises(StaleWeights, match="engines attest"):
        versions.accept(shipment, "f")


def test_a_slot_that_was_not_sent_and_changed_is_noticed() -> None:
    engine = Member(0)
    versions = Versions({engine: {"policy": ("p0",), "partner": ("q0",)}})
    versions.joined(versions.reopen({engine: 1}).epoch)
    shipment = Shipment(1, "policy", ())
    versions.shipping(shipment)
    versions.attested({engine: Attestation(0, 1, "f", {"policy": ("p1",), "partner": ("spoilt",)})})
    with pytest.raises(StaleWeights, match="sent for the policy, but in engine 0 those of the partner changed"):
        versions.accept(shipment, "f")
    assert versions.missing() == ("policy",)
