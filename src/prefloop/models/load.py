"""Loading policies from a path or a hub id, LoRA adapters included, and saving them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from prefloop.models.settings import LoraSettings
from prefloop.records import PrefloopError

ADAPTER_CONFIG = "adapter_config.json"
REWARD_CONFIG = "reward_model.json"
CONFIG = "config.json"
TOKENIZERS = ("*token*", "*vocab*", "*.model")
"""Names of the files that a tokenizer is read from, one of which there must be."""

HUB_SECONDS = 10.0
"""How long the hub may take to say that it is there."""

transformers_logging.disable_progress_bar()  # prefloop shows its own

PEFT_MISSING = "LoRA needs peft: pip install 'prefloop[train]'"


@dataclass(slots=True)
class Policy:
    """A model with its tokenizer. `model` is a peft model where there is an adapter."""

    model: Any
    tokenizer: PreTrainedTokenizerFast

    def save(self, directory: Path) -> None:
        """Write the model (of an adapter only the adapter) and the tokenizer in Hugging Face's layout."""
        for adapter in getattr(self.model, "peft_config", {}).values():
            if isinstance(adapter.target_modules, set):  # written in an order that differs between processes
                adapter.target_modules = sorted(adapter.target_modules)
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)


def load_policy(
    name: str,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    lora: LoraSettings | None = None,
    device: str = "cpu",
) -> Policy:
    """Load a policy from a directory or a hub id; with `lora`, add a fresh adapter where it has none.

    A fresh adapter is a function of the model and `lora`: loaded anew, by another process too, it is the same.
    A directory that holds an adapter is loaded on top of the model that the adapter names.

    Raises:
        PrefloopError: it is not a causal language model, such as a reward model; it has no tokenizer; peft is missing;
            as `check_place` and `check_device`.
    """
    check_device(device)
    check_place(name)
    if (Path(name) / REWARD_CONFIG).is_file():
        raise _no_policy(name)
    if Path(name).is_dir() and not any(next(Path(name).glob(pattern), None) for pattern in TOKENIZERS):
        raise PrefloopError(f"model {name!r} cannot be loaded: it has no tokenizer; put its tokenizer.json there")
    adapter = (Path(name) / ADAPTER_CONFIG).is_file()
    base = _adapter_base(name) if adapter else name
    try:
        config = AutoConfig.from_pretrained(base)
        if any("Classification" in one for one in config.architectures or ()):
            raise _no_policy(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise PrefloopError(
            f"model {name!r} cannot be loaded: {first_line} Expected a directory in Hugging Face's layout or a hub id"
        ) from None
    wrapped: Any = model
    if adapter:
        wrapped = load_peft().PeftModel.from_pretrained(model, name, is_trainable=True)
    elif lora is not None:
        wrapped = _with_adapter(model, lora)
    return Policy(wrapped.to(device).eval(), tokenizer)


def check_place(name: str) -> None:
    """See that a model's name is a directory that is there, or that of a model of the hub, loaded before or in reach.

    Raises:
        PrefloopError: it is a file, can only be a path and there is nothing, or the hub cannot be reached.
    """
    if Path(name).is_file():
        raise PrefloopError(
            f"model {name!r} cannot be loaded: it is a file; name a directory in Hugging Face's layout or a hub id"
        )
    if Path(name).is_dir():
        return
    missing = f"model {name!r} cannot be loaded: there is no such directory"
    try:
        url = hf_hub_url(name, CONFIG)
    except HFValidationError:
        raise PrefloopError(missing) from None
    if isinstance(try_to_load_from_cache(name, CONFIG), str):
        return
    try:  # once: transformers asks again and again
        get_hf_file_metadata(url, timeout=HUB_SECONDS)
    except HfHubHTTPError:
        return  # it can be reached; transformers says what is wrong
    except Exception as error:  # of whichever client the hub's package uses
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise PrefloopError(f"{missing}, and the hub cannot be reached: {reason}") from None


def _no_policy(name: str) -> PrefloopError:
    return PrefloopError(
        f"model {name!r} cannot be loaded: it gives scores and no longer says anything; name the language model that "
        "it was trained from"
    )


def check_device(name: str) -> None:
    """See that torch can use a device here.

    Raises:
        PrefloopError: it cannot, or there is no device of this name.
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
        raise PrefloopError(f"device {name!r} cannot be used here: expected {known}")


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


def _adapter_base(directory: str) -> str:
    return str(load_peft().PeftConfig.from_pretrained(directory).base_model_name_or_path)


def lora_config(lora: LoraSettings, task_type: str = "CAUSAL_LM") -> Any:
    """The peft configuration of an adapter on all linear layers; a score head is trained in full instead."""
    return load_peft().LoraConfig(
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
        return load_peft().get_peft_model(model, lora_config(lora))
