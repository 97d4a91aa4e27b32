"""The transformers rollout engine against transformers' own generate and forward."""

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from verl.embedding.prompts import PromptRenderer, rationale_messages
from verl.models.attention import ATTENTION
from verl.workers.rollout.base import EngineState, RolloutError, finish, row_seeds
from verl.workers.rollout.hf import HFRollout
from verl.workers.rollout.sampling import sample

TEXTS = ["short", "a somewhat longer text to embed", "mid size text", "short"]


def prompts() -> list[list[int]]:
    return [p.ids for p in PromptRenderer(tiny_tokenizer()).render([rationale_messages(t) for t in TEXTS])]


def engine(stop_ids: list[int], max_num_seqs: int = 100, seed: int = 0, **kwargs) -> HFRollout:
    lm = tiny_model(seed=seed)
    lm.set_attn_implementation(ATTENTION)
    return HFRollout(lm, stop_ids, max_num_seqs, **kwargs)


def greedy_reference(prompt: list[int], stop_ids: list[int], limit: int) -> list[int]:
    out = tiny_model().generate(
        torch.tensor([prompt]),
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=stop_ids or None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def greedy_ids(rollout: HFRollout) -> list[list[int]]:
    return [r.ids for r in finish(rollout.generate(prompts(), [0.0] * 4, 8, row_seeds(0, 4)))]


@pytest.mark.parametrize("max_num_seqs", [1, 3, 100])
def test_greedy_output_is_that_of_generate_with_rows_that_end_early(max_num_seqs):
    free = [greedy_reference(p, [], 24) for p in prompts()]
    # Stop at tokens that occur in the middle of some rows, so that rows leave the batch at different times.
    stop_ids = sorted({free[0][5], free[1][11]})
    expected = [greedy_reference(p, stop_ids, 24) for p in prompts()]
    responses = finish(engine(stop_ids, max_num_seqs).generate(prompts(), [0.0] * 4, 24, row_seeds(0, 4)))
    assert [r.ids for r in responses] == expected
    assert [r.truncated for r in responses] == [ids[-1] not in stop_ids for ids in expected]
    assert any(r.truncated for r in responses) and not all(r.truncated for r in responses)


@pytest.mark.parametrize("max_num_seqs", [1, 3, 100])
def test_each_response_may_have_a_limit_of_its_own(max_num_seqs):
    limits = [3, 24, 1, 8]
    stop_ids = [greedy_reference(prompts()[1], [], 24)[11]]
    expected = [greedy_reference(p, stop_ids, limit) for p, limit in zip(prompts(), limits, strict=True)]
    responses = finish(engine(stop_ids, max_num_seqs).generate(prompts(), [0.0] * 4, limits, row_seeds(0, 4)))
    assert [r.ids for r in responses] == expected
    assert [r.truncated for r in responses] == [ids[-1] not in stop_ids for ids in expected]


def test_every_response_is_yielded_once_when_it_ends():
    stop_ids = [greedy_reference(prompts()[0], [], 24)[5]]
    parts = list(engine(stop_ids).generate(prompts(), [0.0] * 4, 24, row_seeds(0, 4)))
    assert sorted(row for part in parts for row in part) == [0, 1, 2, 3]
    lengths = [len(response.ids) for part in parts for response in part.values()]
    assert len(parts) > 1 and lengths == sorted(lengths)


def test_log_probs_are_those_of_a_forward_at_the_rows_temperature():
    temperatures = [1.0, 0.5, 2.0, 1.0]
    responses = finish(engine([]).generate(prompts(), temperatures, 16, row_seeds(3, 4)))
    lm = tiny_model()
    for prompt, response, temperature in zip(prompts(), responses, temperatures, strict=True):
        logits = lm(torch.tensor([prompt + response.ids])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(response.ids).unsqueeze(1))
        torch.testing.assert_close(torch.tensor(response.log_probs), expected.squeeze(1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [4, 90])
def test_samples_follow_the_tempered_distribution(size):
    """With 90 tokens about a tenth of the probability is outside the 64 tokens that are drawn by cumulative sums."""
    logits = torch.linspace(2.0, 0.0, size)[torch.randperm(size, generator=torch.Generator().manual_seed(1))]
    generator = torch.Generator().manual_seed(0)
    count = 40_000
    uniform = torch.rand(count, dtype=torch.float64, generator=generator)
    token, log_prob = sample(logits.repeat(count, 1), torch.full((count,), 0.8), uniform)
    expected = (logits / 0.8).softmax(-1)
    observed = torch.bincount(token, minlength=size) / count
    standard_error = (expected * (1 - expected) / count).sqrt()
    assert ((observed - expected).abs() < 5 * standard_error).all()
    torch.testing.assert_close(log_prob, expected.log()[token], atol=1e-5, rtol=1e-5)


def test_rounding_hardly_ever_changes_a_token():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2_000, 20_000, generator=generator)
    uniform = torch.rand(2_000, dtype=torch.float64, generator=generator)
    temperature = torch.ones(2_000)
    rounded = logits * (1 + 1e-6 * torch.randn(logits.shape, generator=generator))
    first, second = (sample(x, temperature, uniform)[0] for x in (logits, rounded))
    assert (first != second).sum() <= 2


def test_rationales_of_one_prompt_differ_and_a_seed_repeats_them():
    rows = [prompts()[1]] * 4

    def run(seed: int) -> list[list[int]]:
        return [r.ids for r in finish(engine([]).generate(rows, [1.0] * 4, 12, row_seeds(seed, 4)))]

    first = run(7)
    assert len({tuple(ids) for ids in first}) == 4
    assert run(7) == first
    assert run(8) != first


@pytest.mark.parametrize("max_num_seqs", [1, 2, 100])
def test_a_rows_draws_do_not_depend_on_the_other_rows(max_num_seqs):
    stop_ids = list(range(60))
    seeds = [5, 2**62, 17, 5]
    together = finish(engine(stop_ids).generate(prompts(), [1.0] * 4, 24, seeds))
    rows = [2, 0, 3]
    chosen = [prompts()[i] for i in rows]
    apart = finish(engine(stop_ids, max_num_seqs).generate(chosen, [1.0] * 3, 24, [seeds[i] for i in rows]))
    assert [r.ids for r in apart] == [together[i].ids for i in rows]
    assert together[0].ids == together[3].ids, "one prompt and one seed are one rationale"
    assert len({len(r.ids) for r in together}) > 1


def prompts_of_many_lengths() -> list[list[int]]:
    texts = ["word " * count for count in (40, 1, 12, 3, 25, 2, 1, 7, 60, 5)]
    return [p.ids for p in PromptRenderer(tiny_tokenizer()).render([rationale_messages(t) for t in texts])]


@pytest.fixture
def uninitialized_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("uninitialized_memory_is_nan")
@pytest.mark.parametrize("pools", [True, False])
def test_a_prompt_takes_the_place_of_a_row_that_has_ended(pools):
    stop_ids, seeds, rows = list(range(30)), row_seeds(3, 10), 4
    rollout, shapes = engine(stop_ids, rows), []
    rollout.lm.base_model.register_forward_hook(
        lambda module, args, kwargs, output: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    arguments = (prompts_of_many_lengths(), [1.0] * 10, 40, seeds)
    parts = rollout.generate_and_pool(*arguments, [0] * 10) if pools else rollout.generate(*arguments)
    lengths = [len(response.ids) - (not pools) for response in finish(parts)]
    alone = [finish(engine(stop_ids).generate([p], [1.0], 40, [s])) for p, s in zip(arguments[0], seeds, strict=True)]
    assert [length + (not pools) for length in lengths] == [len(response.ids) for (response,) in alone]
    batches = [shape[0] for shape in shapes if shape[1] == 1]
    assert sum(batches) == sum(lengths) and max(batches) == rows
    # The next four only when the longest of four has ended would take more forwards.
    longest_first = sorted(range(10), key=lambda i: -len(arguments[0][i]))
    waves = [max(lengths[i] for i in longest_first[start : start + rows]) for start in range(0, 10, rows)]
    assert len(batches) < sum(waves)


@pytest.mark.usefixtures("uninitialized_memory_is_nan")
@pytest.mark.parametrize("max_num_seqs", [1, 4, 100])
def test_prompts_of_many_lengths_are_decoded_as_by_generate(max_num_seqs):
    stop_ids = [greedy_reference(p, [], 12)[place] for place, p in enumerate(prompts_of_many_lengths()[:5], start=2)]
    expected = [greedy_reference(p, stop_ids, 12) for p in prompts_of_many_lengths()]
    rollout = engine(stop_ids, max_num_seqs)
    responses = finish(rollout.generate(prompts_of_many_lengths(), [0.0] * 10, 12, row_seeds(0, 10)))
    assert [response.ids for response in responses] == expected


@pytest.mark.parametrize("max_num_seqs", [1, 3, 100])
@pytest.mark.parametrize("limit", [1, 24])
@pytest.mark.parametrize("start", ["beginning", "inside", "response", "last"])
def test_what_is_pooled_is_the_mean_of_the_hidden_states_of_a_forward(start, limit, max_num_seqs):
    stop_ids, seeds = list(range(60)), [5, 2**62, 17, 5]
    starts = [{"beginning": 0, "inside": len(p) - 7, "response": len(p), "last": -1}[start] for p in prompts()]
    pooling = engine(stop_ids, max_num_seqs)
    responses = finish(pooling.generate_and_pool(prompts(), [1.0] * 4, limit, seeds, starts))
    lm = tiny_model()
    for prompt, first, response in zip(prompts(), starts, responses, strict=True):
        states = lm(torch.tensor([prompt + response.ids]), output_hidden_states=True).hidden_states[-1][0].detach()
        torch.testing.assert_close(response.pooled, states[first:].mean(0), atol=1e-5, rtol=1e-5)
    without = finish(engine(stop_ids, max_num_seqs).generate(prompts(), [1.0] * 4, limit, seeds))
    assert [(r.ids, r.truncated) for r in responses] == [(r.ids, r.truncated) for r in without]
    assert all(r.pooled is None for r in without)
    assert limit == 1 or len({len(r.ids) for r in responses}) > 1, "rows end at different times"


def test_ignore_eos_generates_to_the_limit():
    stop_ids = [greedy_reference(prompts()[0], [], 24)[5]]
    responses = finish(engine(stop_ids, ignore_eos=True).generate(prompts(), [0.0] * 4, 24, row_seeds(0, 4)))
    assert [len(r.ids) for r in responses] == [24] * 4


def test_new_weights_change_what_is_generated():
    rollout = engine([])
    before = greedy_ids(rollout)
    rollout.update_weights(tiny_model(seed=1).named_parameters())
    rollout.wake_up()
    assert greedy_ids(rollout) == greedy_ids(engine([], seed=1)) != before


def test_a_weight_that_is_not_sent_is_an_error_that_names_it():
    weights = dict(tiny_model().named_parameters())
    weights.pop("model.norm.weight")
    with pytest.raises(ValueError, match=r"1 weights were not sent, among them 'model\.norm\.weight'"):
        engine([]).update_weights(weights.items())


def test_a_weight_the_engine_does_not_have_is_an_error():
    with pytest.raises(ValueError, match=r"'lm\.nonsense' is not one of the engine's"):
        engine([]).update_weights([("lm.nonsense", torch.zeros(1))])


def test_a_weight_sent_twice_is_an_error_that_names_it():
    weights = list(tiny_model().named_parameters())
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' was sent twice"):
        engine([]).update_weights([*weights, ("model.norm.weight", torch.zeros(64))])


def test_score_gives_the_log_probs_of_a_plain_forward():
    lm = tiny_model()
    for prompt, scores in zip(prompts(), engine([]).score(prompts()), strict=True):
        log_probs = lm(torch.tensor([prompt])).logits[0].detach().log_softmax(-1)
        expected = [float(log_probs[place, token]) for place, token in enumerate(prompt[1:])]
        assert scores == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("state", [EngineState.STALE, EngineState.WEIGHTS_ONLY, EngineState.ASLEEP])
def test_an_engine_that_is_not_awake_neither_generates_nor_scores(state):
    rollout = engine([])
    rollout.state = state
    with pytest.raises(RolloutError, match=f"engine hf must not generate while it is {state.name}"):
        rollout.generate(prompts(), [0.0] * 4, 8, row_seeds(0, 4))
    with pytest.raises(RolloutError, match=f"engine hf must not generate while it is {state.name}"):
        rollout.generate_and_pool(prompts(), [0.0] * 4, 8, row_seeds(0, 4), [0] * 4)
    with pytest.raises(RolloutError, match=f"engine hf must not generate while it is {state.name}"):
        rollout.score(prompts())


def test_a_held_weight_is_the_parameter_itself_and_the_tensor_sent():
    rollout, sent = engine([]), torch.arange(64, dtype=torch.float64)
    (weight,) = rollout.held("model.norm.weight", sent, most_columns=1)
    assert weight.place == "model.norm"
    assert weight.held is rollout.lm.get_parameter("model.norm.weight")
    assert weight.sent.dtype == weight.held.dtype and weight.sent.tolist() == list(range(64))
