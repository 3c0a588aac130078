"""transformers (and peft) as the reference: loads one model and records intermediate values by module path."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from truffula.errors import MissingDependency, UnsupportedModel, some
from truffula.kernels.installation import CPU_TORCH, installation
from truffula.kernels.program import Probe
from truffula.lora.image import AdapterFacts
from truffula.weights.gguf.checkpoint import GgufCheckpoint, open_parts
from truffula.weights.open import open_checkpoint

Float32 = npt.NDArray[np.float32]
_ATTENTION = "truffula_observed"


def require_packages(*, adapter: bool, gguf: bool = False) -> None:
    """Raise ``MissingDependency`` unless the packages of a comparison are installed."""
    packages = ["torch", "transformers", *["peft"] * adapter, *["gguf"] * gguf]
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(
            f"verify compares with transformers and peft; not installed here: {', '.join(missing)}. "
            f"Install them: {installation().pip_install('train')} ({CPU_TORCH}).",
            param=missing[0],
        )


# Architectures whose GGUF files transformers' loader reads as they are.
_READ = frozenset({"gemma2", "gemma3", "llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe"})


class Oracle:
    """A model as transformers computes it, without a cache, in ``dtype``, on the CPU.

    Args:
        path: A model folder or a ``.gguf`` file.
        tied: Whether embedding and head are tied, as ``weights/tying.py`` decides; transformers alone would use a
            random head when the flag is missing or wrong.
        adapter: A PEFT folder to attach, or None.
        dtype: ``float32`` or ``bfloat16``.

    Raises:
        MissingDependency: transformers, torch, peft (with an adapter) or gguf (for such a file) is not installed.
        UnsupportedModel: A GGUF model in parts, or of an architecture that transformers loads as another one.

    Attributes:
        notes: Sentences about limits of the comparison, for its report.
    """

    def __init__(self, path: Path, *, tied: bool, adapter: Path | None = None, dtype: str = "float32") -> None:
        require_packages(adapter=adapter is not None, gguf=path.suffix == ".gguf")
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
        from transformers.utils import logging

        logging.disable_progress_bar()  # the command shows its own progress
        self._seen: dict[str, Float32] = {}
        self._register()
        source: dict[str, Any] = {"pretrained_model_name_or_path": str(path), "local_files_only": True}
        if path.suffix == ".gguf":
            if len(open_parts(path)) > 1:
                raise UnsupportedModel(
                    f"{path} is the first part of a split GGUF model, which transformers does not read; to compare, "
                    f"join the parts: llama-gguf-split --merge {path.name} MODEL.gguf",
                    param=str(path),
                )
            source |= {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        config = _own_config(path) if path.suffix == ".gguf" else None
        by_values = config is not None
        if config is None:
            config = AutoConfig.from_pretrained(**source)
            by_values = getattr(config, "quantization_config", None) is not None
        self.notes = _complete(config, path) if path.suffix == ".gguf" and not by_values else ()
        config.tie_word_embeddings = tied
        factors = _take_factors(config)
        causal = type(config) in AutoModelForCausalLM._model_mapping
        auto = AutoModelForCausalLM if causal else AutoModelForImageTextToText
        kind, implementation = auto._model_mapping[type(config)], _ATTENTION
        if not kind._supports_attention_backend:
            # Some older classes compute attention in their own modules, where nothing can be recorded.
            implementation = "sdpa" if kind._supports_sdpa else "eager"
        loader: Any = auto
        if by_values:
            if getattr(config, "quantization_config", None) is not None:
                del config.quantization_config
            source = {"pretrained_model_name_or_path": None, "state_dict": _values(path)}
            source["ignore_mismatched_sizes"] = path.suffix == ".gguf"  # refused below
            with torch.device("meta"):
                loader = type(auto.from_config(config))
            self.notes = ("transformers computes with the weights that truffula dequantised.",)
        model, loading = loader.from_pretrained(
            **source,
            output_loading_info=True,
            config=config,
            attn_implementation=implementation,
            experts_implementation="eager",
            dtype=getattr(torch, dtype),
        )
        differing = {key[0] for key in loading["mismatched_keys"]}
        if by_values and path.suffix == ".gguf" and (lacking := sorted(loading["missing_keys"] | differing)):
            why = f"transformers has {some(lacking, 3)} of {config.model_type} in another form than a GGUF file"
            raise UnsupportedModel(f"{path} cannot be compared: {why}.", param=str(path))
        model.set_attn_implementation(_ATTENTION)  # some classes do not take it from the argument above
        if factors:
            model.model.rotary_emb.inv_freq /= torch.tensor(factors)
        self._virtual = 0
        self._facts: AdapterFacts | None = None
        self._model = model
        if adapter is not None:
            self._attach(adapter)
        self._model.eval()
        self._modules = dict(model.named_modules())

    def _attach(self, adapter: Path) -> None:
        from peft import PeftModel

        wrapped = PeftModel.from_pretrained(self._model, str(adapter))
        config = wrapped.active_peft_config
        invocation = getattr(config, "alora_invocation_tokens", None)
        if config.is_prompt_learning or invocation:  # these act in the wrapper, not in the modules
            self._model = wrapped
        if config.peft_type in ("PROMPT_TUNING", "P_TUNING"):
            self._virtual = config.num_virtual_tokens
        if invocation:
            self._facts = AdapterFacts(invocation=tuple(invocation))

    def _register(self) -> None:
        """Register an attention function with transformers' eager masks and arithmetic that also records q and k."""
        import torch
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, eager_mask

        def recording_attention(
            module: Any,
            query: Any,
            key: Any,
            value: Any,
            attention_mask: Any,
            scaling: float | None = None,
            softcap: float | None = None,
            s_aux: Any = None,
            **_: Any,
        ) -> tuple[Any, None]:
            own = key[:, :, key.shape[2] - query.shape[2] :]  # without those of a prefix
            rotated = [item.detach()[0].float().transpose(0, 1).flatten(1).numpy() for item in (query, own)]
            self._seen[f"layer {module.layer_idx}"] = np.concatenate(rotated, 1)
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
            scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            if attention_mask is not None:
                scores = scores + attention_mask
            if s_aux is not None:  # a logit per head that counts in the denominator only
                sinks = s_aux.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)
                scores = torch.cat([scores, sinks.to(scores.dtype)], -1)
            weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
            weights = weights[..., : key.shape[2]]
            return (weights @ value).transpose(1, 2).contiguous(), None

        AttentionInterface.register(_ATTENTION, recording_attention)
        AttentionMaskInterface.register(_ATTENTION, eager_mask)

    def logits(self, ids: Iterable[int], prompt: int | None = None) -> Float32:
        """float32 ``[len(ids), V]``. The first ``prompt`` of ``ids`` are the prompt; None: all."""
        return self.observe(ids, (), prompt)[0]

    def observe(
        self, ids: Iterable[int], probes: Iterable[tuple[Probe, int | None]], prompt: int | None = None
    ) -> tuple[Float32, dict[Probe, Float32]]:
        """Logits ``[T, V]`` and, for each probe (with the layer it belongs to), the value there, ``[T, width]``; of
        virtual tokens no rows.

        The ``in`` probe of an attention module is q and k after the rotation.

        Raises:
            KeyError: transformers' model has no such module.
        """
        import torch

        ids = list(ids)
        count, more = self._virtual + len(ids), {}
        if self._facts is not None:
            start = self._facts.acts_from(ids[:prompt])
            more["alora_offsets"] = [None if start is None else len(ids) - start]
        found: dict[Probe, Float32] = {}
        handles, attention = [], {}
        try:
            for probe, layer in probes:
                # Of some multimodal types the class for text is loaded, whose modules are those of the text model.
                names = (probe.module, probe.module.removeprefix("language_model."))
                module = self._modules[next((name for name in names if name in self._modules), probe.module)]
                if probe.side == "in" and hasattr(module, "layer_idx"):
                    attention[probe] = f"layer {layer}"
                elif probe.side == "in":
                    handles.append(module.register_forward_pre_hook(_keep(found, probe, count)))
                else:
                    handles.append(module.register_forward_hook(_keep(found, probe, count)))
            with torch.no_grad():
                logits = self._model(input_ids=torch.tensor([ids]), use_cache=False, **more).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        found |= {probe: self._seen[key] for probe, key in attention.items()}
        own = slice(self._virtual, None)
        return logits[own].float().numpy(), {probe: value[own] for probe, value in found.items()}


def _own_config(path: Path) -> Any:
    """The config that truffula reads from a GGUF file, in transformers' class; None where transformers' loader reads
    the file. It reads some others in part, or wrongly (Falcon's grouped queries)."""
    from transformers import AutoConfig

    if open_parts(path)[0].header.metadata.get("general.architecture") in _READ:
        return None
    with contextlib.closing(GgufCheckpoint(path)) as checkpoint:
        read = checkpoint.config
    if "text_config" in read:
        why = f"{path} holds the text part of a {read['model_type']} model, which transformers does not build alone"
        raise UnsupportedModel(f"{why}; it cannot be compared.", param=str(path))
    config = AutoConfig.for_model(**read)
    if (config.pad_token_id or 0) >= config.vocab_size:
        config.pad_token_id = None  # the class's default
    return config


def _complete(config: Any, path: Path) -> tuple[str, ...]:
    """Set the keys of ``config`` that transformers' GGUF loader does not read, such as rotary scaling; returns a note.

    The loader reads a few keys of each architecture and uses defaults for all others.
    """
    with contextlib.closing(GgufCheckpoint(path)) as checkpoint:
        read = checkpoint.config
    if config.model_type != read["model_type"]:
        raise UnsupportedModel(
            f"{path} is a {read['model_type']} model by its metadata, and transformers loads it as "
            f"{config.model_type}; the two cannot be compared.",
            param=str(path),
        )
    # Attributes, not ``to_dict``: a class may store a key under another name (num_experts as num_local_experts).
    default = {"head_dim": config.hidden_size // config.num_attention_heads}
    theirs = {key: getattr(config, key, default.get(key)) for key in read}
    missing = [key for key, value in read.items() if key != "architectures" and not _equal(theirs[key], value)]
    for key in missing:
        setattr(config, key, read[key])
    if not missing:
        return ()
    return (
        f"transformers' GGUF loader does not read {', '.join(missing)} of this file: there it computes with the values "
        "that truffula reads.",
    )


def _take_factors(config: Any) -> list[float]:
    """Remove and return the divisors of the rotary frequencies, which transformers does not support; empty if none."""
    given = getattr(config, "rope_parameters", None) or {}
    if given.get("rope_type") != "factors":
        return []
    config.rope_parameters = {"rope_type": "default", "rope_theta": given["rope_theta"]}
    return list(given["factors"])


def _values(path: Path) -> dict[str, Any]:
    """The tensors of a quantised checkpoint by name, dequantised: transformers would need the scheme's library.

    Experts that a GGUF file stacks are apart, as in most safetensors files: transformers stacks them in its own way.
    """
    import torch

    values: dict[str, Any] = {}
    with contextlib.closing(open_checkpoint(path)) as opened:
        for name in opened.tensors:
            value = torch.from_numpy(opened.read(name).astype(np.float32))
            stack = re.fullmatch(r"(.+\.experts)\.(\w+\.weight)", name)
            stacked = {f"{stack[1]}.{index}.{stack[2]}": each for index, each in enumerate(value)} if stack else {}
            values |= stacked or {name: value}
    return values


def _equal(one: Any, other: Any) -> bool:
    """Whether two values of a configuration are equal, floats to within float32."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)


def _keep(found: dict[Probe, Float32], probe: Probe, count: int) -> Any:
    """A hook that keeps a module's input or, for a hook that gets it, its output."""

    def hook(_module: Any, *values: Any) -> None:
        value = values[-1]
        found[probe] = _rows(value[0] if isinstance(value, tuple) else value, count)

    return hook


def _rows(value: Any, count: int) -> Float32:
    """``[1, T, ...]``, or ``[T, width]`` (of experts, of OPT's MLP), as float32 ``[T, width]``.

    A value of shape ``[1, H, T, E]`` is transposed first. If H equals ``count``, the strides distinguish the two: norms
    keep the memory order of their input.
    """
    value = (value if value.dim() == 2 else value[0]).detach().float()
    if value.dim() == 3:
        by_head = value.shape[0] != count or (value.shape[1] == count and value.stride(0) < value.stride(1))
        value = value.transpose(0, 1) if by_head else value
    return np.array(value.reshape(count, -1).numpy(), np.float32)
