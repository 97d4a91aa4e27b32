"""Shards that two gloo processes read from a model's files, against the model that transformers loads whole."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measured import peak_of
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_model
from transformers import AutoModelForCausalLM

from verl.config import FsdpConfig, ModelConfig
from verl.models.fsdp import adapter_weights, full_weights, shard
from verl.models.load import load_causal_lm
from verl.models.lora import add_adapter, file_name, is_part, write_adapter_config
from verl.models.packing import Row, pack
from verl.models.policy import PolicyModel
from verl.models.sharded_load import load_to_shard

CPU = torch.device("cpu")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# llama, tied, dtype, files
PLAIN = [
    (llama, tied, dtype, files)
    for llama in (False, True) for tied in (False, True) for dtype in DTYPES for files in ("one file", "several")
]  # fmt: skip
RATE = 0.05


def save_model(folder: Path, llama: bool, tied: bool, dtype: str, files: str) -> None:
    lm = tiny_model(tied, llama=llama).to(DTYPES[dtype])
    with torch.no_grad():
        for weight in lm.parameters():  # norms and biases, which begin as ones and zeros
            weight.add_(0.05 * torch.randn_like(weight))
    lm.save_pretrained(folder, max_shard_size="5GB" if files == "one file" else "100KB")
    assert (len(list(folder.glob("*.safetensors"))) > 2) == (files == "several")


def folder_name(case: tuple) -> str:
    llama, tied, dtype, files = case
    return f"{'llama' if llama else 'qwen2'} {'tied' if tied else 'untied'} {dtype} {files}"


def packed():
    system = tuple(range(5, 20))
    return pack([Row(system + (31, 32), (7, 8, 9), 0, True), Row(system + (44,), tuple(range(50, 61)), 0, True)], True)


def learn(policy: PolicyModel) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Log-probs, and the weights before and after a step down the gradient of their sum."""
    before = {name: weight.clone() for name, weight in full_weights(policy)}
    log_probs = policy(packed()).log_probs
    log_probs.sum().backward()
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    torch.optim.SGD(trained, lr=RATE).step()
    return log_probs.detach(), before, {name: weight.clone() for name, weight in full_weights(policy)}


def load(folder: Path, fsdp: FsdpConfig, model: ModelConfig | None = None) -> PolicyModel:
    """As a worker loads its policy."""
    loaded = load_to_shard(str(folder), False, {}, "auto", CPU)
    assert loaded.source, loaded.why_whole
    assert all(weight.is_meta for weight in loaded.lm.parameters())
    if model:
        add_adapter(loaded.lm, model, seed=3)
    policy = shard(PolicyModel(loaded.lm), CPU, fsdp, offload_policy=False)
    loaded.source.fill(policy, CPU)
    return policy


def run_rank(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    found = {}
    for case in PLAIN:
        policy = load(folder / folder_name(case), FsdpConfig())
        tied = policy.lm.get_input_embeddings().weight is policy.lm.get_output_embeddings().weight
        buffers = {name: buffer.clone() for name, buffer in policy.lm.named_buffers()}
        local = sum(weight.to_local().numel() for weight in policy.parameters())
        found[case] = (*learn(policy), tied, buffers, local)
    found["replicated"] = learn(load(folder / folder_name(PLAIN[0]), FsdpConfig(fsdp_size=1)))
    for kind, model in adapter_models(folder).items():
        policy = load(folder / folder_name(PLAIN[-1]), FsdpConfig(), model)
        parts = {name: part.clone() for name, part in adapter_weights(policy)}
        found[kind] = (parts, *learn(policy))
    found["peaks"] = [peak_of(lambda: lambda: load(folder / "deep", FsdpConfig())), peak_of(lambda: whole(folder))]
    dist.destroy_process_group()
    torch.save(found, folder / f"rank_{rank}.pt")


def whole(folder: Path):
    return lambda: shard(PolicyModel(load_causal_lm(str(folder / "deep"))), CPU, FsdpConfig(), offload_policy=False)


def adapter_models(folder: Path) -> dict[str, ModelConfig]:
    path = str(folder / folder_name(PLAIN[-1]))
    own = ModelConfig(path=path, lora_rank=4, target_modules=["q_proj", "down_proj"])
    return {"new adapter": own, "given adapter": ModelConfig(path=path, lora_adapter_path=str(folder / "adapter"))}


def save_adapter(folder: Path) -> None:
    """One that changes the model."""
    path = folder / folder_name(PLAIN[-1])
    lm = load_causal_lm(str(path))
    add_adapter(lm, adapter_models(folder)["new adapter"], seed=9)
    parts = {file_name(name): 0.1 * torch.randn_like(part) for name, part in lm.named_parameters() if is_part(name)}
    (folder / "adapter").mkdir()
    save_file(parts, folder / "adapter" / "adapter_model.safetensors")
    write_adapter_config(lm, folder / "adapter", str(path))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded_load")
    for case in PLAIN:
        save_model(folder / folder_name(case), *case)
    save_adapter(folder)
    config = tiny_config(False, hidden_size=128, llama=True)
    config.num_hidden_layers, config.intermediate_size = 12, 1024
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "deep", max_shard_size="2MB")
    mp.spawn(run_rank, args=(2, folder), nprocs=2)
    return folder


def ranks(folder: Path):
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in (0, 1)]


def assert_same(found: tuple, expected: tuple) -> None:
    """Two results of `learn`."""
    log_probs, before, after = found
    expected_log_probs, expected_before, expected_after = expected
    assert list(before) == list(expected_before)
    for name, weight in expected_before.items():
        assert before[name].dtype == torch.float32 and torch.equal(before[name], weight), name
        torch.testing.assert_close(after[name], expected_after[name], atol=1e-5, rtol=1e-5)
    assert any(not torch.equal(after[name], before[name]) for name in after)
    torch.testing.assert_close(log_probs, expected_log_probs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", PLAIN, ids=folder_name)
def test_shards_hold_the_weights_that_transformers_loads_and_learn_as_they_do(loaded, case):
    whole = load_causal_lm(str(loaded / folder_name(case)))
    buffers = {name: buffer.clone() for name, buffer in whole.named_buffers()}
    numbers = sum(weight.numel() for weight in whole.parameters())
    expected = learn(PolicyModel(whole))
    for found in ranks(loaded):
        *learned, tied, own_buffers, local = found[case]
        assert_same(tuple(learned), expected)
        assert tied == case[1]
        assert own_buffers.keys() == buffers.keys() and all(torch.equal(own_buffers[n], buffers[n]) for n in buffers)
        assert local < 0.52 * numbers
    if case == PLAIN[0]:
        for found in ranks(loaded):
            assert_same(found["replicated"], expected)


@pytest.mark.parametrize("kind", ["new adapter", "given adapter"])
def test_adapters_keep_their_numbers_beside_weights_that_are_read(loaded, kind):
    lm = load_causal_lm(str(loaded / folder_name(PLAIN[-1])))
    add_adapter(lm, adapter_models(loaded)[kind], seed=3)
    parts = {file_name(name): part.detach().clone() for name, part in lm.named_parameters() if is_part(name)}
    expected = learn(PolicyModel(lm))
    for found in ranks(loaded):
        own, *learned = found[kind]
        assert own.keys() == parts.keys() and all(torch.equal(own[name], parts[name]) for name in parts)
        assert_same(tuple(learned), expected)


def test_a_rank_never_allocates_the_whole_model(loaded):
    files = list((loaded / "deep").glob("*.safetensors"))
    size = sum(weight.numel() * 4 for file in files for weight in load_file(file).values())
    assert len(files) > 8
    for found in ranks(loaded):
        by_shards, whole = found["peaks"]
        # Half of it is kept. One file is mapped at a time, which counts as allocated here.
        assert by_shards < 0.7 * size < size <= whole
