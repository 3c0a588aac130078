"""Flags and commands of other servers, and what to write in their place.

Sources: the launcher references of LoRAX and text-generation-inference, ``vllm serve --help``, the README of
llama.cpp's server and the help of its ``llama-cli``, SGLang's list of server arguments, ``ollama --help``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class ForeignFlag:
    """One flag of other servers.

    ``ours`` is what to write instead. It is empty where there is no such option; then ``note`` says why. Beside
    ``ours``, ``note`` is a sentence that explains it, or empty.
    """

    flag: str
    servers: tuple[str, ...]
    ours: str
    note: str = ""

    @property
    def message(self) -> str:
        """``--lora-modules is an option of vLLM; in truffula: --adapter NAME=FOLDER (repeat it for several).``"""
        *others, last = self.servers
        owners = f"{', '.join(others)} and {last}" if others else last
        if not self.ours:
            return f"{self.flag} is an option of {owners}; {self.note}"
        return f"{self.flag} is an option of {owners}; in truffula: {self.ours}.{' ' if self.note else ''}{self.note}"


_LORAX = ("LoRAX", "TGI")
_MODEL = "MODEL, the first argument, or TRUFFULA_MODEL"
_ADAPTER = "--adapter NAME=FOLDER (repeat it for several)"
_CPU_ONLY = "truffula has no GPU kernels yet: leave it out."
_ANY_RANK = "truffula serves adapters of any rank: leave it out."
_LEAVE_OUT = "truffula does not need it: leave it out."

_ROWS: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
    # flags (comma-separated spellings), servers, ours, note
    # --- the model and its files
    ("--model-id", _LORAX, _MODEL, ""),
    ("--model, -m", ("vLLM", "llama.cpp"), _MODEL, ""),
    ("--model-path", ("SGLang",), _MODEL, ""),
    ("--hf-repo, -hf, -hfr", ("llama.cpp",), "ORG/NAME/FILE.gguf as MODEL, the first argument", ""),
    ("--hf-file, -hff", ("llama.cpp",), "ORG/NAME/FILE.gguf as MODEL, the first argument", ""),
    ("--hf-token, -hft", ("llama.cpp", "vLLM"), "the variable HF_TOKEN, or `hf auth login`", ""),
    ("--source", ("LoRAX",), "", "truffula detects whether MODEL is a path, an alias or a Hub id: leave it out."),
    ("--tokenizer, --tokenizer-mode", ("vLLM",), "", "the tokenizer is read from the model's own files."),
    ("--tokenizer-path", ("SGLang",), "", "the tokenizer is read from the model's own files."),
    ("--load-format", ("vLLM", "SGLang"), "", "the format, safetensors or GGUF, is detected: leave it out."),
    ("--trust-remote-code", (*_LORAX, "vLLM", "SGLang"), "", "truffula never runs code from a model: leave it out."),
    ("--huggingface-hub-cache, --weights-cache-override", _LORAX, "--cache-dir FOLDER", ""),
    ("--download-dir", ("vLLM", "SGLang"), "--cache-dir FOLDER", ""),
    ("--alias", ("llama.cpp",), "--served-model-name NAME", ""),
    ("--chat-template-file", ("llama.cpp",), "--chat-template FILE", ""),
    ("--jinja", ("llama.cpp",), "", "the model's Jinja chat template is always used: leave it out."),
    ("--generation-config", ("vLLM",), "--generation-defaults", ""),
    # --- adapters
    ("--adapter-id", ("LoRAX",), "--adapter NAME=SOURCE", "Clients then name it as adapter_id or as model."),
    ("--preloaded-adapter-ids", ("LoRAX",), _ADAPTER, ""),
    ("--default-adapter-source", ("LoRAX",), "--adapter-source hub|local", ""),
    ("--lora-modules", ("vLLM",), _ADAPTER, ""),
    ("--lora-paths", ("SGLang",), _ADAPTER, ""),
    ("--lora", ("llama.cpp",), _ADAPTER, "FOLDER is in PEFT's format; adapters in GGUF files are not served."),
    ("--lora-scaled", ("llama.cpp",), _ADAPTER, "The scale is set by lora_alpha in adapter_config.json."),
    ("--lora-init-without-apply", ("llama.cpp",), _ADAPTER, "Each request names its adapter, or none."),
    ("--enable-lora", ("vLLM", "SGLang"), "", "adapters can always be served: leave it out."),
    ("--max-lora-rank", ("vLLM", "SGLang"), "", _ANY_RANK),
    ("--lora-target-modules", ("SGLang",), "", "the modules are read from each adapter: leave it out."),
    ("--lora-dtype", ("vLLM",), "", "an adapter keeps the dtype of its file: leave it out."),
    ("--fully-sharded-loras, --lora-extra-vocab-size", ("vLLM",), "", _LEAVE_OUT),
    ("--max-active-adapters", ("LoRAX",), "--adapter-memory SIZE", "Memory is the only limit on their number."),
    ("--max-loras, --max-cpu-loras", ("vLLM",), "--adapter-memory SIZE", "Memory is the only limit on their number."),
    (
        "--max-loras-per-batch, --max-loaded-loras", ("SGLang",),
        "--adapter-memory SIZE", "Memory is the only limit on their number.",
    ),
    (
        "--adapter-cycle-time-s", ("LoRAX",), "",
        "requests for all adapters run in one batch, so adapters do not take turns: leave it out.",
    ),
    ("--adapter-memory-fraction", ("LoRAX",), "--adapter-memory SIZE", ""),
    # --- lengths, batches and queues
    ("--max-input-length, --max-input-tokens", _LORAX, "--max-model-len N", "N counts prompt and answer together."),
    ("--max-total-tokens", _LORAX, "--max-model-len N", ""),
    ("--ctx-size, -c", ("llama.cpp",), "--max-model-len N", "N is the length of one sequence, not of all of them."),
    ("--context-length", ("SGLang",), "--max-model-len N", ""),
    ("--max-batch-prefill-tokens", _LORAX, "--step-tokens N", ""),
    ("--max-num-batched-tokens", ("vLLM",), "--step-tokens N", ""),
    ("--batch-size, -b, --ubatch-size, -ub", ("llama.cpp",), "--step-tokens N", ""),
    ("--chunked-prefill-size, --max-prefill-tokens", ("SGLang",), "--step-tokens N", ""),
    ("--max-batch-total-tokens", _LORAX, "--memory SIZE", "The number of tokens follows from the memory."),
    ("--max-batch-size", ("TGI",), "--max-running N", ""),
    ("--max-num-seqs", ("vLLM",), "--max-running N", ""),
    ("--parallel, -np", ("llama.cpp",), "--max-running N", ""),
    ("--max-running-requests", ("SGLang",), "--max-running N", ""),
    (
        "--max-concurrent-requests", _LORAX, "--max-open-requests N",
        "--max-running limits those in the batch, --max-waiting those in the queue.",
    ),
    ("--max-queued-requests", ("SGLang",), "--max-waiting N", ""),
    ("--max-top-n-tokens", ("TGI",), "--max-logprobs N", ""),
    ("--max-waiting-tokens, --waiting-served-ratio", _LORAX, "", "waiting requests join at every step: leave it out."),
    ("--cont-batching, -cb", ("llama.cpp",), "", "continuous batching is always on: leave it out."),
    ("--enable-chunked-prefill", ("vLLM",), "", "long prompts are always computed in chunks: leave it out."),
    ("--validation-workers", _LORAX, "", _LEAVE_OUT),
    # --- memory and the KV cache
    ("--gpu-memory-utilization", ("vLLM",), "--memory SIZE", "SIZE is absolute, such as 8GiB."),
    ("--mem-fraction-static", ("SGLang",), "--memory SIZE", "SIZE is absolute, such as 8GiB."),
    ("--cuda-memory-fraction", _LORAX, "--memory SIZE", "SIZE is absolute, such as 8GiB."),
    ("--enable-prefix-caching, --no-enable-prefix-caching", ("vLLM",), "--prefix-cache or --no-prefix-cache", ""),
    ("--cache-prompt, --no-cache-prompt", ("llama.cpp",), "--prefix-cache or --no-prefix-cache", ""),
    ("--disable-radix-cache", ("SGLang",), "--no-prefix-cache", ""),
    ("--page-size", ("SGLang",), "--block-size N", ""),
    ("--swap-space, --cpu-offload-gb", ("vLLM",), "", _CPU_ONLY),
    ("--kv-cache-dtype", ("vLLM", "TGI", "SGLang"), "", "the KV cache has the compute dtype, that of --dtype."),
    ("--cache-type-k, -ctk, --cache-type-v, -ctv", ("llama.cpp",), "", "the KV cache has the dtype of --dtype."),
    ("--mlock, --no-mmap", ("llama.cpp",), "", "weights are packed into memory at start: leave it out."),
    # --- hardware
    ("--num-shard, --sharded", _LORAX, "", _CPU_ONLY),
    ("--tensor-parallel-size, -tp, --pipeline-parallel-size, -pp", ("vLLM",), "", _CPU_ONLY),
    ("--data-parallel-size, -dp", ("vLLM",), "", "start several servers behind a load balancer."),
    ("--tp-size, --tp, --dp-size, --dp", ("SGLang",), "", _CPU_ONLY),
    ("--gpu-layers, --n-gpu-layers, -ngl", ("llama.cpp",), "", _CPU_ONLY),
    ("--main-gpu, -mg, --tensor-split, -ts, --split-mode, -sm", ("llama.cpp",), "", _CPU_ONLY),
    ("--compile", ("LoRAX",), "", _CPU_ONLY),
    ("--cuda-graphs", ("TGI",), "", _CPU_ONLY),
    ("--disable-custom-kernels", _LORAX, "", _CPU_ONLY),
    ("--enforce-eager", ("vLLM",), "", "truffula does not use CUDA graphs: leave it out."),
    ("--flash-attn, -fa", ("llama.cpp",), "", "there is one attention kernel and it is always used: leave it out."),
    ("-t, --threads-batch, -tb", ("llama.cpp",), "--threads N", ""),
    ("--threads-http", ("llama.cpp",), "", _LEAVE_OUT),
    ("--quantization, -q", ("vLLM", "SGLang"), "--quantize q8_0", "It rounds the weights at load; GGUF needs none."),
    # --- HTTP, access and logs
    ("--hostname", _LORAX, "--host ADDRESS", ""),
    ("-p", ("LoRAX", "TGI", "llama.cpp"), "--port PORT", "A prompt (llama.cpp) is `truffula generate MODEL PROMPT`."),
    ("--cors-allow-origin", _LORAX, "--cors-origin ORIGIN (repeat it for several)", ""),
    ("--allowed-origins", ("vLLM",), "--cors-origin ORIGIN (repeat it for several)", ""),
    ("--cors-origins", ("llama.cpp",), "--cors-origin ORIGIN (repeat it for several)", ""),
    ("--timeout, -to", ("llama.cpp",), "--request-timeout SECONDS", ""),
    ("--json-output", _LORAX, "--log-format json", ""),
    ("--verbose", ("llama.cpp",), "--log-level debug", ""),
    ("--disable-log-requests, --disable-log-stats", ("vLLM",), "--log-level warning", ""),
    ("--uvicorn-log-level", ("vLLM",), "--log-level LEVEL", ""),
    ("--otlp-endpoint", _LORAX, "", "tracing is not supported yet; metrics are served at /metrics."),
    ("--metrics", ("llama.cpp",), "", "/metrics is always served: leave it out."),
    (
        "--ssl-keyfile, --ssl-certfile", ("vLLM",), "",
        "TLS is not supported; put a reverse proxy (nginx, Caddy) in front.",
    ),
    ("--api-key-file", ("llama.cpp",), "--api-key KEY, or the variable TRUFFULA_API_KEYS", ""),
    ("--env", _LORAX, "`truffula doctor`", ""),
    ("--download-only", ("LoRAX",), "`truffula pull MODEL`", ""),
    # --- prompts and sampling
    ("--prompt", ("llama.cpp",), "the second argument, as in `truffula generate MODEL PROMPT`", ""),
    ("-n, --predict, --n-predict", ("llama.cpp",), "--max-tokens N of `truffula generate` and `truffula chat`",
     "Each request gives its own value (max_tokens)."),
    ("--temp", ("llama.cpp",), "--temperature VALUE of `truffula generate` and `truffula chat`",
     "Each request gives its own value (temperature)."),
    ("--top-k, --min-p, --repeat-penalty", ("llama.cpp",), "",
     "each request gives its own value (top_k, min_p, repetition_penalty)."),
    ("--random-seed", ("SGLang",), "--seed N of `truffula generate`", "Each request gives its own value (seed)."),
    ("--system-prompt, -sys", ("llama.cpp",), "--system TEXT of `truffula chat`", ""),
    ("--conversation, -cnv, --interactive", ("llama.cpp",), "`truffula chat MODEL`", ""),
)  # fmt: skip

FOREIGN: Mapping[str, ForeignFlag] = MappingProxyType(
    {
        flag: ForeignFlag(flag, servers, ours, note)
        for spellings, servers, ours, note in _ROWS
        for flag in spellings.split(", ")
    }
)
"""By flag, as the other server spells it."""

FOREIGN_COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "run": "run is a command of Ollama; in truffula: `truffula chat MODEL`, or `truffula generate MODEL PROMPT`.",
        "show": "show is a command of Ollama; in truffula: `truffula inspect MODEL`.",
        "create": "create is a command of Ollama; "
        "truffula needs no Modelfile: `truffula serve MODEL --adapter NAME=FOLDER`.",
        "rm": "rm is a command of Ollama; "
        "truffula has no such command. Delete the file: `truffula list --json` prints its path.",
        "stop": "stop is a command of Ollama; truffula has no such command. End a server with Ctrl-C or SIGTERM, "
        "or unload an adapter with `truffula adapters unload NAME`.",
        "cp": "cp is a command of Ollama; truffula has no such command. Name a model with --served-model-name.",
        "push": "push is a command of Ollama; truffula has no such command. Upload a folder with `hf upload`.",
        "complete": "complete is a command of vLLM; in truffula: `truffula generate MODEL PROMPT`.",
        "collect-env": "collect-env is a command of vLLM; in truffula: `truffula doctor`.",
        "run-batch": "run-batch is a command of vLLM; "
        "truffula has no such command. In Python: LLM(...).generate(prompts).",
        "download-weights": "download-weights is a command of LoRAX and TGI; in truffula: `truffula pull MODEL`.",
        "download": "In truffula: `truffula pull MODEL`.",
    }
)
"""By command: the whole answer."""


def foreign_flags(words: Iterable[str], own: Mapping[str, bool]) -> list[ForeignFlag]:
    """Those of a command line's ``words`` that are another server's flags and none of the command's own.

    Args:
        words: The arguments after the command's name.
        own: The command's own flags; the value is whether it takes the next word as its value.
    """
    flags: list[ForeignFlag] = []
    skip = False
    for word in words:
        if skip:
            skip = False
            continue
        if word == "--":
            break
        name, equals, _ = word.partition("=")
        if name in own:
            skip = own[name] and not equals
            continue
        if name.startswith("--"):
            found = FOREIGN.get(name.replace("_", "-"))
        else:  # -c4096: a short flag with its value, unless that is a short flag of the command
            short = re.fullmatch(r"(-[a-z])\d+", name)
            found = FOREIGN.get(name) or (FOREIGN.get(short[1]) if short and short[1] not in own else None)
        if found is not None and found not in flags:
            flags.append(found)
    return flags
