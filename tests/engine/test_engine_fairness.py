"""The order of service: no stream stalls, no adapter and no tenant starves, and every request ends."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st
from rig import Rig, limits, request

from truffula.engine.plan import StepPlan
from truffula.engine.scheduler import MOST_ADMITTED
from truffula.types import AdapterCommand, AdapterRef


def watch(rig: Rig) -> dict[int, list[int]]:
    """By step number: the serials that the step computes tokens of. Recorded where the executable sees them."""
    served: dict[int, list[int]] = {}
    submit = rig.engine._runner.submit

    def recording(plan: StepPlan):
        served[rig.steps] = [chunk.serial for chunk in plan.chunks]
        return submit(plan)

    rig.engine._runner.submit = recording
    return served


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([None, "a", "b", "c", "d"]), st.integers(1, 60), st.integers(1, 12)),
        min_size=1, max_size=14,
    ),
    st.integers(4, 40), st.integers(1, 8),
)  # fmt: skip
def test_an_admitted_request_among_a_adapters_gets_tokens_within_a_plus_1_steps(crowd, step_tokens, max_running):
    # No place is taken from a running request (``patience``): only the shares of the budget are looked at.
    rig = Rig(limits(step_tokens=step_tokens, max_running=max_running, num_blocks=400, patience=10**6))
    served = watch(rig)
    for i, (adapter, prompt, new) in enumerate(crowd):
        rig.add(request(f"r{i}", [i] * prompt, adapter=adapter, max_tokens=new, ignore_eos=True))
    waited: dict[int, int] = defaultdict(int)
    while not rig.engine.idle():
        before = [sequence.serial for sequence in rig.running()]
        active = {sequence.key for sequence in [*rig.running(), *rig.waiting()]}
        rig.step()
        for serial in before:
            waited[serial] = 0 if serial in served.get(rig.steps, []) else waited[serial] + 1
            assert waited[serial] <= len(active) + 1
    assert rig.engine.stats().preemptions == 0


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["red", "blue", "green"]), st.sampled_from([None, "a", "b", "c"]), st.integers(1, 60),
            st.integers(1, 12),
        ),
        min_size=1, max_size=14,
    ),
    st.tuples(*[st.sampled_from([0.1, 1.0, 3.0])] * 3), st.integers(8, 40), st.integers(1, 8),
)  # fmt: skip
def test_the_stated_bound_on_waiting_holds_for_tenants(crowd, weights, step_tokens, max_running):
    """An admitted request has tokens within T * A steps, and one more: T tenants with work, A adapters of its own."""
    weight = dict(zip(("red", "blue", "green"), weights, strict=True))
    rig = Rig(limits(step_tokens=step_tokens, max_running=max_running, num_blocks=400, patience=10**6))
    served = watch(rig)
    for i, (tenant, adapter, prompt, new) in enumerate(crowd):
        more = {"tenant": tenant, "weight": weight[tenant], "ignore_eos": True}
        rig.add(request(f"r{i}", [i] * prompt, adapter=adapter, max_tokens=new, **more))
    waited: dict[int, int] = defaultdict(int)
    while not rig.engine.idle():
        before = {sequence.serial: sequence.key for sequence in rig.running()}
        active = {sequence.key for sequence in [*rig.running(), *rig.waiting()]}
        tenants = {tenant for tenant, _ in active}
        rig.step()
        for serial, (tenant, _) in before.items():
            own = sum(one == tenant for one, _ in active)
            waited[serial] = 0 if serial in served.get(rig.steps, []) else waited[serial] + 1
            assert waited[serial] <= len(tenants) * own + 1
    rig.assert_clean()


def test_tenants_share_prompt_tokens_by_their_weights_whatever_their_adapters():
    rig = Rig(limits(max_model_len=4000, step_tokens=128, max_running=16, num_blocks=12000))
    for i in range(8):  # eight adapters do not make a tenant's share larger
        rig.add(request(f"many{i}", [i] * 3900, adapter=f"a{i}", max_tokens=1, tenant="many", weight=1.0))
    rig.add(request("one", [50] * 3900, adapter="a0", max_tokens=1, tenant="one", weight=1.0))
    rig.add(request("heavy", [60] * 3900, max_tokens=1, tenant="heavy", weight=2.0))
    while len(rig.running()) < 10:
        rig.step()
    begin = {sequence.serial: sequence.num_computed for sequence in rig.running()}
    for _ in range(40):
        rig.step()
    gained: dict[str, int] = defaultdict(int)
    for sequence in rig.running():
        # One token a step is not by turns: each running sequence gets it.
        gained[sequence.key[0]] += sequence.num_computed - begin[sequence.serial] - 40
    assert len(rig.running()) == 10 and sum(gained.values()) == 40 * (128 - 10)
    for tenant, share in (("many", 1 / 4), ("one", 1 / 4), ("heavy", 1 / 2)):
        assert abs(gained[tenant] - share * 40 * 118) <= 128, dict(gained)


def test_a_sequence_without_weight_takes_what_others_leave():
    free = {"tenant": "shadow", "weight": 0.0, "ignore_eos": True}
    rig = Rig(limits(max_model_len=600, step_tokens=32, max_running=2, num_blocks=800, patience=4))
    rig.add(request("shadow", [9] * 500, adapter="s", max_tokens=2, **free))
    rig.step()
    rig.add(request("prompt", [1] * 300, adapter="a", max_tokens=1, tenant="t"))
    begun = rig.steps
    while rig.answers["prompt"].final is None:
        rig.step()
    assert rig.steps - begun <= 1 + -(-300 // 29) + 1, "all but a few tokens of each step"
    rig.drain()
    # It waits for as long as others fill the places, and takes none of them.
    for i in range(2):
        rig.add(request(f"stream{i}", [i] * 4, max_tokens=60, tenant="t", ignore_eos=True))
    rig.step()
    rig.add(request("waits", [9] * 4, adapter="s", max_tokens=200, **free))
    rig.step()
    while rig.answers["stream0"].final is None:
        rig.step()
        assert rig.answers["waits"].steps == []
    assert rig.engine.stats().preemptions == 0
    # Where it has one, it gives it up.
    rig.add(request("too", [8] * 4, adapter="s", max_tokens=200, **free))
    rig.step()
    rig.step()
    rig.add(request("late", [7] * 4, adapter="b", max_tokens=3, tenant="t", ignore_eos=True))
    begun = rig.steps
    while rig.answers["late"].final is None:
        rig.step()
    assert rig.steps - begun <= rig.limits.patience + 6
    rig.drain()
    rig.assert_clean()


def test_a_tenant_that_holds_every_place_with_many_adapters_gives_one_up():
    rig = Rig(limits(step_tokens=16, max_running=4, num_blocks=400, patience=8))
    for i in range(20):
        more = {"adapter": f"a{i}", "tenant": "flood", "ignore_eos": True}
        rig.add(request(f"flood{i}", [i] * 4, max_tokens=100, **more))
    while len(rig.running()) < 4 or rig.steps < 6:
        rig.step()
    rig.add(request("lonely", [7] * 4, adapter="a0", max_tokens=3, tenant="other", ignore_eos=True))
    entered = rig.steps
    while rig.answers["lonely"].final is None:
        rig.step()
    assert rig.steps - entered <= rig.limits.patience + 6
    rig.drain()
    rig.assert_clean()


def test_a_long_prompt_stalls_no_running_stream():
    rig = Rig(limits(max_model_len=1000, step_tokens=16, num_blocks=400))
    for i in range(3):
        rig.add(request(f"stream{i}", [i] * 4, max_tokens=80, ignore_eos=True))
    rig.step()
    rig.add(request("long", [9] * 900, max_tokens=1, adapter="red"))
    rig.drain()
    for i in range(3):
        steps = rig.answers[f"stream{i}"].steps
        assert steps == list(range(steps[0], steps[0] + 80))
    # It had what the three streams left: thirteen tokens a step while they ran.
    assert rig.answers["long"].steps[0] <= 2 + -(-900 // 13)


def test_a_step_admits_few_long_prompts_that_are_cached():
    # Each costs no more than a token to compute, but the keys of all its blocks are made and looked up.
    rig = Rig(limits(max_model_len=4096, step_tokens=256, step_logit_rows=64, max_running=64, num_blocks=3000))
    prompt = [5] * 4000
    rig.run([request("first", prompt, max_tokens=1)])
    served = watch(rig)
    rig.run([request(f"r{i}", prompt, max_tokens=1, ignore_eos=True) for i in range(32)])
    assert max(map(len, served.values())) == -(-MOST_ADMITTED // len(prompt))
    assert all(answer.finish_reason == "length" for answer in rig.answers.values())


def test_a_flood_of_prompts_for_one_adapter_delays_another_by_a_few_steps():
    rig = Rig(limits(step_tokens=16, max_running=8, num_blocks=400))
    for i in range(60):
        rig.add(request(f"flood{i}", [i % 90] * 60, adapter="popular", max_tokens=1))
    for _ in range(3):
        rig.step()
    rig.add(request("lonely", [5] * 6, adapter="rare", max_tokens=1))
    entered = rig.steps
    while rig.answers["lonely"].final is None:
        rig.step()
    # At the latest after patience ran out and a place was taken for it; the flood lasts for hundreds of steps.
    assert rig.steps - entered <= rig.limits.patience + 4
    rig.drain()
    assert rig.steps > 200


def test_a_flood_that_holds_every_place_for_long_gives_one_up():
    rig = Rig(limits(step_tokens=16, max_running=4, num_blocks=400, patience=8))
    for i in range(20):
        rig.add(request(f"flood{i}", [i] * 4, adapter="popular", max_tokens=100, ignore_eos=True))
    rig.step()
    for i in range(2):
        rig.add(request(f"rare{i}", [7] * 4, adapter=f"rare{i}", max_tokens=3, ignore_eos=True))
    entered = rig.steps
    while any(rig.answers[f"rare{i}"].final is None for i in range(2)):
        rig.step()
    assert rig.steps - entered <= 2 * (rig.limits.patience + 5)
    rig.drain()
    steps = rig.answers["flood0"].steps
    assert steps == list(range(steps[0], steps[0] + 100)), "the oldest of all is never preempted"


def test_many_adapters_share_prompt_tokens_equally():
    rig = Rig(limits(max_model_len=400, step_tokens=32, max_running=8, num_blocks=1000))
    for adapter in ("a", "b", "c", "d"):
        # b, c and d bring one prompt each; a brings five.
        for i in range(5 if adapter == "a" else 1):
            rig.add(request(f"{adapter}{i}", [i] * 300, adapter=adapter, max_tokens=1))
    rig.drain()
    ends = {name: answer.steps[0] for name, answer in rig.answers.items()}
    fair = 4 * 300 / 32  # steps for one prompt of each
    assert max(ends["b0"], ends["c0"], ends["d0"]) <= 1.5 * fair
    assert ends["a4"] == max(ends.values())


def test_a_big_request_is_not_passed_by_small_ones_for_ever():
    rig = Rig(limits(step_tokens=16, max_running=4, num_blocks=25, patience=4, prefix_cache=False))
    small = 0

    def add_small() -> None:
        nonlocal small
        rig.add(request(f"small{small}", [small % 90] * 12, adapter=f"s{small % 7}", max_tokens=8, ignore_eos=True))
        small += 1

    for _ in range(6):
        add_small()
    rig.step()
    rig.add(request("big", [1] * 80, adapter="big", max_tokens=2))
    for _ in range(300):
        while rig.engine.stats().waiting < 6:
            add_small()
        rig.step()
        if rig.answers["big"].final is not None:
            break
    assert rig.answers["big"].final is not None
    rig.drain()
    rig.assert_clean()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(9, 16),
    st.lists(st.tuples(st.sampled_from(["a", "a", "a", "b", None]), st.integers(5, 10)), max_size=10),
    st.integers(1, 20), st.booleans(),
)  # fmt: skip
def test_with_hardly_any_memory_every_request_still_ends(num_blocks, crowd, step_tokens, prefix_cache):
    # Each needs up to eight blocks; there are as few as eight.
    lim = limits(num_blocks=num_blocks, step_tokens=step_tokens, patience=2, prefix_cache=prefix_cache)
    rig = Rig(lim)
    for i, (adapter, prompt) in enumerate(crowd):
        rig.add(request(f"r{i}", [i] * prompt, adapter=adapter, max_tokens=32 - prompt, ignore_eos=True))
    rig.drain(most=200 + 60 * len(crowd))
    rig.assert_clean()
    assert all(answer.finish_reason == "length" for answer in rig.answers.values())


def test_a_thousand_waiting_adapters_load_a_few_at_a_time():
    rig = Rig(limits(prefetch_adapters=5, max_running=2))
    rig.loader.automatic = False
    for i in range(1000):
        rig.add(request(f"r{i}", [1, 2], adapter=f"a{i}", max_tokens=1))
    rig.step()
    assert rig.loader.started == [f"a{i}" for i in range(5)]
    rig.loader.finish()
    rig.step()
    rig.step()
    assert len(rig.loader.started) <= 12


def test_a_source_that_hangs_keeps_only_its_own_adapters_from_loading():
    rig = Rig(limits(prefetch_adapters=5, max_running=2))
    rig.loader.automatic = False
    for i in range(100):
        hanging = AdapterRef(name=f"h{i}", kind="s3", locator=f"s3://hangs/h{i}")
        rig.add(request(f"h{i}", [1, 2], adapter=hanging, max_tokens=1))
    rig.step()
    assert len(rig.loader.started) == 5
    elsewhere = AdapterRef(name="e", kind="s3", locator="s3://other/e")
    rig.add(request("e", [1, 2], adapter=elsewhere, max_tokens=1))
    rig.add(request("local", [1, 2], adapter="local", max_tokens=1))
    for _ in range(2 + 100 // 5):  # a step looks at some of the adapters that wait
        rig.step()
        rig.loader.finish(["s3://other/e", "local"])
    rig.step()
    assert rig.answers["e"].final is not None and rig.answers["local"].final is not None
    assert len(rig.loader.started) == 7


def test_many_sources_that_hang_keep_no_other_from_loading():
    """More adapters of theirs load than a step looks at."""
    rig = Rig(limits(prefetch_adapters=2, max_running=2))
    rig.loader.automatic = False
    for i in range(20):
        hanging = AdapterRef(name=f"h{i}", kind="s3", locator=f"s3://hangs{i // 2}/h{i}")
        rig.add(request(f"h{i}", [1, 2], adapter=hanging, max_tokens=1))
    for _ in range(20):
        rig.step()
    assert len(rig.loader.started) == 20
    rig.add(request("local", [1, 2], adapter="local", max_tokens=1))
    for _ in range(4):
        rig.step()
        rig.loader.finish(["local"])
    assert rig.answers["local"].final is not None


def test_a_short_prompt_does_not_wait_for_a_long_one_of_its_adapter():
    rig = Rig(limits(max_model_len=2000, step_tokens=16, num_blocks=800))
    rig.add(request("long", [9] * 1600, max_tokens=1))
    rig.step()
    rig.add(request("short", [5] * 6, max_tokens=1))
    rig.step()
    rig.step()
    assert rig.answers["short"].final is not None
    rig.drain()
    assert rig.answers["long"].steps[0] <= 103, "it lost no more than the other took"


def test_with_places_to_spare_a_flood_delays_another_adapter_by_one_turn():
    rig = Rig(limits(step_tokens=16, max_running=16, num_blocks=2000, patience=10**6))
    for i in range(300):
        rig.add(request(f"flood{i}", [i % 90] * 8, adapter=f"popular{i % 3}", max_tokens=1))
    rig.step()
    for i in range(8):
        rig.step()
        rig.add(request(f"lonely{i}", [5] * 7, adapter=f"rare{i}", max_tokens=1))
        entered = rig.steps
        while rig.answers[f"lonely{i}"].final is None:
            rig.step()
        # A step to load it, a turn of each of the three others (two a step), its own.
        assert rig.steps - entered <= 5
    assert any(rig.answers[f"flood{i}"].final is None for i in range(300))


def test_adapters_that_want_more_than_there_is_get_equal_shares():
    rig = Rig(limits(max_model_len=2000, step_tokens=40, num_blocks=4000))
    for i in range(5):
        rig.add(request(f"r{i}", [i] * 1500, adapter=[None, "a", "b", "c", "d"][i], max_tokens=1))
    while len(rig.running()) < 5:
        rig.step()
    begin = {sequence.serial: sequence.num_computed for sequence in rig.running()}
    for _ in range(100):
        rig.step()
        gained = [sequence.num_computed - begin[sequence.serial] for sequence in rig.running()]
        # A quantum is half a step: no prompt is ahead by more than one, one kept from before and the order of a turn.
        assert max(gained) - min(gained) <= 3 * 20


def test_prompts_that_do_not_fit_together_wait_instead_of_being_preempted():
    rig = Rig(limits(num_blocks=41, step_tokens=16, prefix_cache=False))
    for i in range(6):
        rig.add(request(f"r{i}", [i] * 70, adapter=f"a{i}", max_tokens=1))
    rig.drain()
    assert rig.engine.stats().preemptions == 0


def test_one_that_had_its_token_already_may_still_be_preempted():
    # Three of a run and hold two blocks each; the base's one, the newest, needs its second when none is left.
    rig = Rig(limits(num_blocks=8, prefix_cache=False))
    rig.engine.command(AdapterCommand(action="load", ref=AdapterRef(name="a", locator="a")))
    rig.step()
    for i in range(3):
        rig.add(request(f"a{i}", [i] * 5, adapter="a", max_tokens=8, ignore_eos=True))
    rig.add(request("base", [9] * 3, max_tokens=8, ignore_eos=True))
    rig.step()
    rig.step()
    assert rig.engine.stats().running == 4
    rig.step()
    assert rig.engine.stats().preemptions == 1
    assert [len(rig.answers[name].token_ids) for name in ("a0", "a1", "a2", "base")] == [3, 3, 2, 3]
    rig.drain()
    rig.assert_clean()


def test_the_oldest_of_all_is_never_preempted():
    rig = Rig(limits(num_blocks=14, step_tokens=32, prefix_cache=False, patience=1))
    for i in range(7):
        rig.add(request(f"r{i}", [i] * 4, adapter=["a", "b"][i % 2] if i else None, max_tokens=40, ignore_eos=True))
    rig.drain()
    assert rig.engine.stats().preemptions > 5
    steps = rig.answers["r0"].steps
    assert steps == list(range(steps[0], steps[0] + 40))
