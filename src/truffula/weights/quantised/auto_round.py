"""AutoRound: its files are in the layout of GPTQ or AWQ, as ``packing_format`` says."""

from __future__ import annotations

from truffula.weights.quantised.awq import Awq
from truffula.weights.quantised.gptq import as_gptq
from truffula.weights.quantised.keys import Keys
from truffula.weights.quantised.logical import Scheme

_GPTQ, _GPTQ_V2 = ("auto_round:auto_gptq", "auto_round:gptq", "auto"), ("auto_round", "auto_round:gptqmodel")
_AWQ = ("auto_round:auto_awq", "auto_round:awq")
_HOW_IT_WAS_MADE = (
    *("act_bits", "act_data_type", "act_dynamic", "act_group_size", "act_sym", "amp", "autoround_version"),
    *("batch_size", "block_name_to_quantize", "dataset", "enable_minmax_tuning", "enable_norm_bias_tuning"),
    *("enable_quanted_input", "gradient_accumulate_steps", "iters", "low_gpu_mem_usage", "lr", "minmax_lr", "nsamples"),
    *("quant_block_list", "quant_lm_head", "scale_dtype", "seqlen", "super_bits", "super_group_size", "sym"),
    *("to_quant_block_names", "train_bs", "desc_act", "damp_percent", "true_sequential", "static_groups"),
)


def read_auto_round(keys: Keys) -> Scheme:
    """The scheme of a ``quantization_config`` with ``quant_method`` auto-round."""
    known = (*_GPTQ, *_GPTQ_V2, *_AWQ)
    backend = keys.raw("backend")  # of version 0.4, without packing_format: auto_round:gptq:exllamav2
    named = ":".join(backend.split(":")[:2]) if isinstance(backend, str) else ""
    packing = keys.choice("packing_format", known, named if ":" in named else "auto_round:auto_gptq")
    keys.choice("data_type", ("int",), "int")
    keys.must_be("act_bits", (16, 32), "rounded activations are not supported.")
    for module, settings in (keys.mapping("extra_config") or {}).items():
        if not isinstance(settings, dict):
            raise keys.error("extra_config", f"the entry {module!r} must be an object.")
    overridden = bool(keys.raw("extra_config"))
    keys.names("modules_to_not_convert")
    keys.skip(*_HOW_IT_WAS_MADE)
    if packing not in _AWQ:
        return as_gptq("auto-round", keys, overridden=overridden, less_one=packing in _GPTQ)
    keys.must_be("bits", (4,), "AWQ's layout has 4 bits.")
    size = keys.group_size("group_size", 128)
    return Awq(method="auto-round", group_size=None if overridden else size)
