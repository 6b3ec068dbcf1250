"""Loading policies from a path or a hub id, LoRA adapters included, and saving them."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from prefloop.hub import ADAPTER_CONFIG, fetch_model, model_name, readable
from prefloop.models.settings import Dtype, LoraSettings, Quantization
from prefloop.records import NoDeviceError, PrefloopError

REWARD_CONFIG = "reward_model.json"
EXPECTED = "Expected a directory in Hugging Face's layout or a hub id"
TOKENIZERS = ("*token*", "*vocab*", "*.model")
"""Names of the files that a tokenizer is read from, one of which there must be."""

transformers_logging.disable_progress_bar()  # prefloop shows its own
# It speaks of what it lacks when peft looks whether it is there, and then at each product of matrices of its types.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

BITS_MISSING = "weights of 8 or 4 bits need bitsandbytes: pip install 'prefloop[bitsandbytes]'"
PEFT_MISSING = "LoRA needs peft: pip install 'prefloop[train]'"

WIDTHS = (64, 32)
"""What the widths in and out of a layer of 4 bits must be multiples of on a CPU, where bitsandbytes packs them anew."""


@dataclass(slots=True, weakref_slot=True)
class Policy:
    """A model with its tokenizer. `model` is a peft model where there is an adapter.

    `base` says which weights are below the adapter, or are its own: of equal names they are equal until they are
    trained. `frozen`: nobody trains it. `more`: its adapter was saved with weights of the model, such as embeddings.
    """

    model: Any
    tokenizer: PreTrainedTokenizerFast
    base: str = ""
    frozen: bool = False
    more: bool = False

    def save(self, directory: Path) -> None:
        """Write the model (of an adapter only the adapter) and the tokenizer in Hugging Face's layout."""
        for adapter in getattr(self.model, "peft_config", {}).values():
            if isinstance(adapter.target_modules, set):  # written in an order that differs between processes
                adapter.target_modules = sorted(adapter.target_modules)
        # Else peft asks the hub whether the vocabulary has grown.
        options = {"save_embedding_layers": self.more} if hasattr(self.model, "peft_config") else {}
        self.model.save_pretrained(directory, **options)
        self.tokenizer.save_pretrained(directory)


def load_policy(
    name: str,
    *,
    dtype: Dtype = "float32",
    lora: LoraSettings | None = None,
    device: str = "cpu",
    quantization: Quantization | None = None,
    frozen: bool = False,
    beside: Iterable[Policy] = (),
) -> Policy:
    """Load a policy from a directory or a hub id; with `lora`, add a fresh adapter where it has none.

    A fresh adapter is a function of the model and `lora`: loaded anew, by another process too, it is the same.
    A directory that holds an adapter is loaded on top of the model that the adapter names; `lora`, where it is given,
    must have its rank and alpha. An adapter, or a model that is to be `frozen`, shares its base weights, the very
    tensors, with a policy `beside` it that has the same ones and leaves them as they are. With `quantization` its base
    weights have 8 or 4 bits (NF4 with a second quantisation, Dettmers et al. 2023, arXiv:2305.14314), all but the
    embeddings and the head.

    Raises:
        PrefloopError: it is not a causal language model, such as a reward model; it has no tokenizer; peft or
            bitsandbytes is missing; quantised weights would be trained, or are of a width that bitsandbytes cannot
            take; `lora` is another adapter than the one that is there; as `fetch_model` and `check_device`.
    """
    check_device(device)
    directory = fetch_model(name)
    if (directory / REWARD_CONFIG).is_file():
        raise _no_policy(name)
    if not any(next(directory.glob(pattern), None) for pattern in TOKENIZERS):
        raise PrefloopError(f"model {name!r} cannot be loaded: it has no tokenizer; put its tokenizer.json there")
    adapter = (directory / ADAPTER_CONFIG).is_file()
    with readable(f"model {name!r}", EXPECTED):
        if adapter and lora is not None:
            _check_same(directory, lora, name)
        base = adapter_base(directory) if adapter else name
        weights = f"{fetch_model(base).resolve()} in {quantization or ''}{dtype} on {device}"
        more = adapter and _holds_more(directory)
        keeps_base = (adapter or lora is not None or frozen) and not more
        if quantization is not None and not keeps_base:
            raise _untrainable(name, quantization)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        sharer = next((one for one in beside if keeps_base and one.base == weights and _keeps_base(one)), None)
        model: Any = _load_causal(base, name, dtype, device, quantization) if sharer is None else _bare(sharer)
        if adapter:
            model = load_peft().PeftModel.from_pretrained(model, directory, is_trainable=not frozen)
    if not adapter and lora is not None:
        model = _with_adapter(model, lora)
    model = (model if quantization is not None else model.to(device)).eval()
    return Policy(model.requires_grad_(False) if frozen else model, tokenizer, weights, frozen, more)


def _load_causal(base: str, name: str, dtype: Dtype, device: str, quantization: Quantization | None) -> PreTrainedModel:
    """The language model of a directory or hub id; its configuration says of which."""
    directory = fetch_model(base)
    config = AutoConfig.from_pretrained(directory)
    if any("Classification" in one for one in config.architectures or ()):
        raise _no_policy(name)
    options: dict[str, Any] = {}
    if quantization is not None:
        options = {"device_map": {"": device}, "quantization_config": _bits(quantization, dtype)}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype), **options)
    if quantization == "4bit" and device.startswith("cpu"):
        _check_widths(model, name)
    for module in model.modules():
        if type(module).__name__ in ("Linear8bitLt", "Linear4bit"):
            module.register_forward_pre_hook(_as_in_training)
    remember_hub(model, base)
    return model


def _as_in_training(layer: torch.nn.Module, _given: object) -> None:
    """Let a layer of few bits compute in evaluations what it does in training.

    On a CPU bitsandbytes else rounds activations to 8 bits there, too, and packs weights of 4 bits for good, through
    which no gradient passes from then on.
    """
    layer.training = True


def _check_widths(model: PreTrainedModel, name: str) -> None:
    """See that bitsandbytes can compute every layer of 4 bits on a CPU.

    Raises:
        PrefloopError: a layer's width is no multiple of `WIDTHS`.
    """
    for layer, module in model.named_modules():
        if type(module).__name__ != "Linear4bit":
            continue
        widths = (module.in_features, module.out_features)
        for side, width, multiple in zip(("in", "out"), widths, WIDTHS, strict=True):
            if width % multiple:
                raise PrefloopError(
                    f"model {name!r} in 4bit: the width {side} of its layer {layer} is {width}, and on a CPU "
                    f"bitsandbytes takes multiples of {multiple} alone: give quantization 8bit or a GPU, or leave "
                    "quantization out"
                )


def _bits(quantization: Quantization, dtype: Dtype) -> BitsAndBytesConfig:
    """How the package bitsandbytes keeps weights.

    Raises:
        PrefloopError: it is not installed.
    """
    try:
        import accelerate  # noqa: F401  (transformers places quantised weights with it)
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise PrefloopError(BITS_MISSING) from None
    # It uses that product where nothing needs its gradient; a test holds all gradients against plain matrices.
    warnings.filterwarnings("ignore", message="bitsandbytes::gemv_4bit: an autograd kernel was not registered")
    if quantization == "8bit":
        # Without outliers: which columns have some depends on all rows of a batch, so a row's result would, too.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def remember_hub(model: Any, base: str) -> None:
    """Let a model of a hub say so, and not where the cache keeps it: its adapters are saved with this name."""
    found = None if Path(base).is_dir() else model_name(base)
    if found is not None:
        model.name_or_path = model.config.name_or_path = found.repo
        model.config._commit_hash = fetch_model(base).name


def _keeps_base(policy: Policy) -> bool:
    """Whether nobody changes the weights below a policy's adapter, or its own."""
    adapters = getattr(policy.model, "peft_config", {}).values()
    return policy.frozen or (bool(adapters) and all(one.peft_type == "LORA" and one.bias == "none" for one in adapters))


def _holds_more(adapter: Path) -> bool:
    """Whether an adapter's file holds weights of the model itself, which are copied into it."""
    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        return True  # who knows
    with safe_open(file, "pt") as opened:
        return any("lora_" not in name for name in opened.keys())  # noqa: SIM118  (no mapping)


def _bare(policy: Policy) -> Any:
    """The model below a policy's adapter as a tree of modules of its own around the very same tensors."""
    states = (getattr(module, "state", None) for module in policy.model.modules())
    of_bits = (vars(state).values() for state in states if type(state).__name__ == "MatmulLtState")  # of 8-bit layers
    held = (value for values in of_bits for value in values if isinstance(value, torch.Tensor))
    same = {id(tensor): tensor for tensor in (*policy.model.parameters(), *policy.model.buffers(), *held)}
    copied = copy.deepcopy(policy.model, same)
    return copied.unload() if hasattr(copied, "peft_config") and hasattr(copied, "unload") else copied


def _no_policy(name: str) -> PrefloopError:
    return PrefloopError(
        f"model {name!r} cannot be loaded: it gives scores and no longer says anything; name the language model that "
        "it was trained from"
    )


def _untrainable(name: str, quantization: str) -> PrefloopError:
    return PrefloopError(
        f"model {name!r} in {quantization}: weights of a few bits cannot be trained themselves; train an adapter on "
        "them (--lora-rank, or the table [policy.lora]), or leave quantization out"
    )


def _check_same(adapter: Path, lora: LoraSettings, name: str) -> None:
    """See that an adapter is as the settings say, which have no say in one that is there.

    Raises:
        PrefloopError: its rank or alpha is another.
    """
    there = load_peft().PeftConfig.from_pretrained(adapter)
    rank, alpha = getattr(there, "r", None), getattr(there, "lora_alpha", None)
    if (rank, alpha) != (lora.rank, lora.alpha):
        raise PrefloopError(
            f"model {name!r} is an adapter of rank {rank} and alpha {alpha} already, which is trained on, not one of "
            f"rank {lora.rank} and alpha {lora.alpha}: leave the table [policy.lora] out, or name the model below it"
        )


def check_device(name: str) -> None:
    """See that torch can use a device here.

    Raises:
        NoDeviceError: it cannot, or there is no device of this name.
    """
    try:
        usable = not torch.zeros(1, device=name).is_meta
    except (
        RuntimeError,
        AssertionError,
        ImportError,
    ):  # which of them depends on the device and on how torch was built
        usable = False
    if not usable:
        known = " or ".join(["'cpu'", *(f"'cuda:{i}'" for i in range(torch.cuda.device_count()))])
        raise NoDeviceError(f"device {name!r} cannot be used here: expected {known}")


def load_peft() -> Any:
    """The package peft.

    Raises:
        PrefloopError: it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise PrefloopError(PEFT_MISSING) from None
    return peft


def adapter_base(directory: Path) -> str:
    """The model that an adapter changes: a path, or a hub id at the revision that it names."""
    config = load_peft().PeftConfig.from_pretrained(directory)
    base = str(config.base_model_name_or_path)
    return f"{base}@{config.revision}" if config.revision and not Path(base).is_dir() else base


def lora_config(lora: LoraSettings, model: Any, task_type: str = "CAUSAL_LM") -> Any:
    """The peft configuration of an adapter on all linear layers; a score head is trained in full instead."""
    return load_peft().LoraConfig(
        revision=getattr(model.config, "_commit_hash", None),
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        exclude_modules=None if task_type == "CAUSAL_LM" else r"(.*\.)?score(\..*)?",
        task_type=task_type,
    )


def _with_adapter(model: PreTrainedModel, lora: LoraSettings) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lora.seed)
        return load_peft().get_peft_model(model, lora_config(lora, model))
