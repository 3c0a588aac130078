"""Names of request fields in the APIs of other servers and clients: what this server's routes call them, if anything.

Four tables, looked up by ``foreign_fields.py``. A name that is in none of them is unknown: it is accepted, logged and
listed in ``x-truffula-ignored``. Sources: the request classes and documentation of OpenAI, LoRAX, TGI, vLLM, SGLang,
llama.cpp, Ollama, mlx_lm, Mistral, Anthropic and transformers' ``GenerationConfig``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


def squeezed(name: str) -> str:
    """``name`` without case and separators: ``maxTokens``, ``max-tokens`` and ``max_tokens`` are one name."""
    return name.replace("_", "").replace("-", "").lower()


def is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether ``value`` asks for nothing: null, or one of ``neutral``. A boolean never equals a number."""
    if value is None:
        return True
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)


@dataclass(frozen=True, slots=True)
class Aliases:
    """Names of one field. A route calls it by the first name that is a field of the route.

    ``neutral`` are values that ask for nothing; null always does. ``advice`` is for routes without such a field.
    """

    names: tuple[str, ...]
    neutral: tuple[Any, ...] = ()
    advice: str = "leave it out"


def _aliases(names: str, neutral: tuple[Any, ...] = (), advice: str = "leave it out") -> Aliases:
    return Aliases(tuple(names.split()), neutral, advice)


_CHAT = "it is a field of /v1/chat/completions"
_THINKING = "use chat_template_kwargs with the variable that the model's template reads"
ALIASES: tuple[Aliases, ...] = (
    _aliases(
        "max_tokens max_completion_tokens max_new_tokens n_predict num_predict max_length max_output_tokens "
        "max_gen_len max_gen_toks max_tokens_to_sample max_tokens_to_generate tokens_to_generate"
    ),
    _aliases("model model_id model_name"),
    _aliases("min_tokens min_new_tokens min_length", (0,)),
    _aliases("messages message chat_history", ([],), "send a conversation to /v1/chat/completions"),
    _aliases("prompt inputs input text prompts contents query input_text input_ids prompt_token_ids messages"),
    _aliases("system instructions system_prompt", ("",), "send it as the first message, with role system"),
    _aliases("stop stop_sequences stop_strings stop_words stop_sequence stop_str stops stop_seqs antiprompt", ([], "")),
    _aliases("stop_token_ids eos_token_id eos_token_ids stop_tokens", ([],)),
    _aliases("logprobs details return_logprob return_details", (False,)),
    _aliases(
        "top_logprobs top_n_tokens return_k_alternatives n_probs top_logprobs_num num_logprobs n_logprobs logprobs",
        (0,),
    ),
    _aliases("prompt_logprobs decoder_input_details return_input_logprobs", (False,)),
    _aliases("return_token_ids return_tokens details", (False,)),
    _aliases("temperature temp"),
    _aliases("do_sample", (True,), "set temperature: 0 for greedy decoding"),
    _aliases("repetition_penalty repeat_penalty rep_pen", (1,)),
    _aliases("typical_p typical typ_p", (1,)),
    _aliases("seed random_seed rng_seed sampling_seed", (-1,)),
    _aliases("n num_return_sequences num_choices n_choices candidate_count best_of", (1,)),
    _aliases("echo return_full_text return_prompt", (False,)),
    _aliases("truncate_prompt_tokens truncate truncation_length max_input_length max_prompt_tokens"),
    _aliases("num_ctx n_ctx ctx_size context_length", (), "the server's --max-model-len sets the context length"),
    _aliases("ignore_eos ignore_eos_token", (False,)),
    _aliases("include_stop_str_in_output no_stop_trim", (True,)),
    _aliases("skip_special_tokens", (True,)),
    _aliases("add_special_tokens add_bos_token add_bos", (True,)),
    _aliases("return_tokens_as_token_ids", (False,)),
    _aliases("stream_options", ({},), "the details of the last event hold the counts"),
    _aliases("apply_chat_template", (False,), "/v1/chat/completions applies the template, /v1/completions does not"),
    _aliases("chat_template_kwargs", ({},), _CHAT),
    _aliases("add_generation_prompt", (True,), _CHAT),
    _aliases("continue_final_message", (False,), _CHAT),
    _aliases("reasoning_effort", (), _CHAT),
    _aliases("documents", ([],), _CHAT),
    _aliases("think enable_thinking thinking reasoning thinking_budget", (), _THINKING),
)
# No route has such a field: name → values that ask for nothing.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        # OpenAI
        "suffix": ("",),
        "response_format": ({"type": "text"},),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "prediction": (),
        "audio": (),
        "modalities": (["text"], []),
        "web_search_options": (),
        "moderation": (),
        # LoRAX, TGI
        "schema": (),
        "guideline": ("",),
        "watermark": (False,),
        "grammar": ("",),
        # vLLM, SGLang
        "structured_outputs": ({},),
        "guided_json": (),
        "guided_regex": ("",),
        "guided_choice": ([],),
        "guided_grammar": ("",),
        "regex": ("",),
        "ebnf": ("",),
        "json_schema": (),
        "structural_tag": (),
        "stop_regex": ("", []),
        "use_beam_search": (False,),
        "beam_width": (1,),
        "allowed_token_ids": ([],),
        "bad_words": ([],),
        "logits_processors": ([],),
        "custom_logit_processor": ("",),
        "logprob_start_len": (-1,),
        "logprob_token_ids": ([],),
        "priority": (0,),
        "truncation_side": ("left",),
        "chat_template": (),
        "thinking_token_budget": (),
        "prompt_embeds": (),
        "input_embeds": (),
        "kv_transfer_params": (),
        "detokenize": (True,),
        "repetition_detection": (),
        "return_hidden_states": (False,),
        "session_params": (),
        # llama.cpp, Ollama, mlx_lm, text-generation-webui
        "mirostat": (0,),
        "mirostat_mode": (0,),
        "tfs": (1,),
        "tfs_z": (1,),
        "top_a": (0,),
        "top_n_sigma": (-1,),
        "dynatemp_range": (0,),
        "dynamic_temperature": (False,),
        "xtc_probability": (0,),
        "dry_multiplier": (0,),
        "smoothing_factor": (0,),
        "repeat_last_n": (),
        "repetition_context_size": (),
        "penalize_nl": (False,),
        "samplers": (),
        "sampler_priority": (),
        "n_indent": (0,),
        "n_keep": (0,),
        "num_keep": (),
        "min_keep": (0,),
        "t_max_predict_ms": (0, -1),
        "response_fields": ([],),
        "image_data": ([],),
        "images": ([],),
        "format": ("",),
        "raw": (False,),
        "template": ("",),
        "context": ([],),
        "cfg_scale": (1,),
        "negative_prompt": ("",),
        # Mistral, Anthropic
        "safe_prompt": (False,),
        "prefix": (False, ""),
        "prompt_mode": (),
        # transformers
        "length_penalty": (1,),
        "early_stopping": (False,),
        "num_beams": (1,),
        "num_beam_groups": (1,),
        "diversity_penalty": (0,),
        "no_repeat_ngram_size": (0,),
        "encoder_no_repeat_ngram_size": (0,),
        "encoder_repetition_penalty": (1,),
        "penalty_alpha": (0,),
        "epsilon_cutoff": (0,),
        "eta_cutoff": (0,),
        "top_h": (),
        "bad_words_ids": ([],),
        "force_words_ids": ([],),
        "constraints": ([],),
        "sequence_bias": ({},),
        "suppress_tokens": ([],),
        "begin_suppress_tokens": ([],),
        "forced_bos_token_id": (),
        "forced_eos_token_id": (),
        "decoder_start_token_id": (),
        "exponential_decay_length_penalty": (),
        "renormalize_logits": (False,),
        "guidance_scale": (1,),
        "token_healing": (False,),
        "watermarking_config": (),
        "dola_layers": (),
        "max_time": (),
        "output_scores": (False,),
        "output_logits": (False,),
        "output_attentions": (False,),
        "output_hidden_states": (False,),
    }
)
# Known, and without effect on the text: name → values that ask for nothing. Another value is listed as ignored.
INERT: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "api_token": ("",),
        "user": ("",),
        "metadata": ({},),
        "store": (False,),
        "service_tier": ("auto", "default"),
        "safety_identifier": ("",),
        "prompt_cache_key": ("",),
        "prompt_cache_retention": (),
        "prompt_cache_options": (),
        "verbosity": (),
        "parallel_tool_calls": (True,),
        "tool_prompt": ("",),
        "include_reasoning": (True,),
        "separate_reasoning": (True,),
        "stream_reasoning": (True,),
        "spaces_between_special_tokens": (True,),
        "guided_decoding_backend": ("",),
        "guided_whitespace_pattern": ("",),
        "cache_prompt": (True,),
        "keep_alive": (),
        # They adjust a sampler that is refused where it is switched on.
        "mirostat_tau": (),
        "mirostat_eta": (),
        "dry_base": (),
        "dry_allowed_length": (),
        "dry_penalty_last_n": (),
        "dry_sequence_breakers": (),
        "xtc_threshold": (),
        "dynatemp_exponent": (),
    }
)
# Objects in which other servers and clients put fields of a request. What is inside has no effect here.
HOLDERS = frozenset(
    {
        "parameters",
        "params",
        "options",
        "config",
        "kwargs",
        "extra",
        "extra_body",
        "extra_args",
        "extra_params",
        "custom_params",
        "sampling",
        "sampling_params",
        "generation_config",
        "generation_kwargs",
        "generate_kwargs",
        "gen_kwargs",
        "model_kwargs",
        "inference_config",
        "nvext",
        "vllm_xargs",
        "body",
    }
)
