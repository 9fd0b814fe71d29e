"""engine.c computes what the PyTorch module computes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gpt2_model import GPT, GPTConfig, generate
from gpt2_model.cpu.engine import FLAGS, EngineDecoder, Unavailable, library
from gpt2_model.cpu.int8 import quantize
from gpt2_model.decoding import TorchDecoder, make_decoder

SMALL = {"n_layer": 3, "n_head": 4, "n_embd": 64, "block_size": 64, "vocab_size": 331}
VARIANTS = {
    "plain": {},
    "gelu": {"activation_function": "gelu"},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu"},
    "tanh": {"activation_function": "tanh"},
    "n_inner": {"n_inner": 77},
    "epsilon": {"layer_norm_epsilon": 0.1},
    "unscaled": {"scale_attn_weights": False},
    "by_layer": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "untied": {"tie_word_embeddings": False},
    "odd": {"n_embd": 3 * 7, "n_head": 3, "vocab_size": 101},  # nothing is a multiple of a vector's length
    "wide": {"n_embd": 272, "n_head": 2, "n_layer": 1},
    "one_head": {"n_head": 1},
}


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> None:
    try:
        library(torch.float32)
    except Unavailable as reason:
        pytest.skip(f"engine.c cannot be compiled here: {reason}")


def random_model(**fields) -> GPT:
    torch.manual_seed(1)
    model = GPT(GPTConfig(**{**SMALL, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: zeros and ones hide mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def largest_difference(model: GPT, reference: GPT) -> float:
    """Prompts of several lengths, samples of them, a row that leaves, 20 steps: the engine against the module on
    the whole sequences, in units of the logits' spread."""
    prompts = [[5, 9, 100], [7], list(range(30)), [3, 1, 4, 1, 5]]
    torch.manual_seed(2)
    decoder = EngineDecoder(model, 64)
    worst = 0.0

    def compare(logits, sequences):
        nonlocal worst
        for row, sequence in zip(logits, sequences, strict=True):
            with torch.no_grad():
                expected = reference(torch.tensor([sequence]))[0][0, -1].float()
            worst = max(worst, ((row - expected).abs().max() / expected.std()).item())

    compare(decoder.prefill(prompts), prompts)
    sequences = [list(prompts[i]) for i in (0, 0, 1, 2, 3, 3)]
    decoder.select([0, 0, 1, 2, 3, 3])
    for step in range(20):
        tokens = torch.randint(0, 100, (len(sequences),)).tolist()
        sequences = [[*sequence, token] for sequence, token in zip(sequences, tokens, strict=True)]
        compare(decoder.step(tokens), sequences)
        if step == 7:
            decoder.select([0, 2, 3, 4, 5])
            del sequences[1]
        if step == 12:
            decoder.refill(3, [8, 8, 8])
            sequences[3] = [8, 8, 8]
    return worst


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_fp32_and_int8_logits(fields) -> None:
    """int8 against the module with the same quantised weights: only the 16 bits of the activations differ."""
    model = random_model(**fields)
    assert largest_difference(model, model) < 2e-5
    quantize(model)
    assert largest_difference(model, model) < 2e-3


@pytest.mark.parametrize("name", ["plain", "n_inner", "untied", "odd", "wide"])
def test_bf16_logits(name) -> None:
    """Against the same bf16 weights in an fp32 module, since the engine adds up in fp32; where the processor
    multiplies bf16, activations are rounded to 8 bits too."""
    model = random_model(**VARIANTS[name]).bfloat16()
    reference = GPT(model.config)
    reference.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    has_bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    assert largest_difference(model, reference) < (5e-2 if has_bf16 else 2e-5)


def test_threads_do_not_change_a_bit() -> None:
    model = random_model()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            decoder = EngineDecoder(model, 64)
            results.append((decoder.prefill([[1, 2, 3], [4]]), decoder.step([5, 6])))
    finally:
        torch.set_num_threads(before)
    for others in zip(*results, strict=True):
        assert all(torch.equal(others[0], other) for other in others)


def test_weights_that_changed_between_calls_are_seen() -> None:
    """A training run draws samples every few steps."""
    model = random_model()
    first = generate(model, [[1, 2]], max_new_tokens=8, temperature=0, stop_ids=())[0].tokens
    with torch.no_grad():
        model.wte.weight.mul_(-1)
    assert generate(model, [[1, 2]], max_new_tokens=8, temperature=0, stop_ids=())[0].tokens != first


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler calls torch.jit
def test_the_compiled_step_of_torch_is_the_plain_one() -> None:
    """On CUDA it is what --compile means; here it runs on the CPU. Rows that left it do no harm."""
    model = random_model()
    plain, compiled = TorchDecoder(model, 20), TorchDecoder(model, 20, compiled=True)
    with torch.inference_mode():
        for decoder in (plain, compiled):
            decoder.prefill([[1, 2, 3], [4, 5]])
            decoder.select([0, 0, 1])
        for step, rows in enumerate([None, None, [1, 2], None, [0], *[None] * 6]):
            if rows:
                plain.select(rows)
                compiled.select(rows)
            tokens = list(range(step, step + len(plain._rows)))
            torch.testing.assert_close(plain.step(tokens), compiled.step(tokens), rtol=0, atol=1e-4)


@pytest.fixture
def uncompiled(tmp_path, monkeypatch) -> Iterator[Path]:
    """An empty cache of compiled engines, in tmp_path."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.cache_clear()
    yield tmp_path
    library.cache_clear()


@pytest.mark.parametrize(("compiler", "message"), [("false", "false: failed"), ("./none", "No such file")])
def test_without_a_compiler_there_is_pytorch(uncompiled, monkeypatch, compiler, message) -> None:
    monkeypatch.setenv("CC", compiler)
    model = random_model()
    assert isinstance(make_decoder(model, 16, None), TorchDecoder)
    assert len(generate(model, [[1]], max_new_tokens=4, stop_ids=())[0].tokens) == 4
    with pytest.raises(ValueError, match=f"cannot compile for this CPU: .*{message}"):
        generate(model, [[1]], compile=True, stop_ids=())
    assert list((uncompiled / "gpt2-model").iterdir()) == []  # nothing half-made


@pytest.mark.parametrize("cache", ["", "file"])
def test_a_cache_folder_that_others_can_write_to_is_not_used(uncompiled, monkeypatch, cache) -> None:
    """Whoever can write there could have us run their code."""
    (uncompiled / "gpt2-model").mkdir()
    (uncompiled / "gpt2-model").chmod(0o777)
    (uncompiled / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(uncompiled / cache))
    monkeypatch.setattr("tempfile.tempdir", str(uncompiled / "gpt2-model"))
    monkeypatch.setattr("gpt2_model.cpu.engine.FLAGS", ("-O0", *FLAGS[1:]))  # which compiles in half the time
    library(torch.float32)
    assert list((uncompiled / "gpt2-model").iterdir()) == []  # neither used nor left behind


def test_an_unsupported_type_runs_on_pytorch() -> None:
    assert isinstance(make_decoder(random_model().half(), 16, None), TorchDecoder)
    assert isinstance(make_decoder(random_model(), 16, None), EngineDecoder)
