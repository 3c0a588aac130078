"""TRL's AsyncGRPO against a served model, in its own environment: ``python trl_script.py URL MODEL OUTPUT``.

It prints TRL's log as JSON, and of each rollout how far its logprobs are from those of each version of the adapter, as
peft computes them. TRL's trainer is written for a GPU, so three things of it are replaced here: the attention
kernel that it fetches from the Hub (by the same in plain torch), the name of the GPU, and the check that vLLM's package
is installed, of which it uses nothing when it sends adapters. All that speaks to the server is unchanged.
"""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.chat_template_utils import qwen2_5_chat_template
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_rollout_worker, packing


def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=None, **_):
    """Causal attention of each segment of queries to the end of its own keys."""
    out = []
    for (q0, q1), (k0, k1) in zip(zip(cu_q, cu_q[1:]), zip(cu_k, cu_k[1:])):  # noqa: B905, RUF007
        last = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
        heads = [x.transpose(0, 1)[None] for x in (q[q0:q1], k[k0:k1], v[k0:k1])]
        mask = torch.arange(k1 - k0)[None] <= last
        made = torch.nn.functional.scaled_dot_product_attention(
            *heads, attn_mask=mask, scale=softmax_scale, enable_gqa=True
        )
        out.append(made[0].transpose(0, 1))
    return torch.cat(out)


# At the top, since TRL's rollout process imports this file again.
packing._flash_attn = lambda: SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
async_rollout_worker.is_vllm_available = lambda: True
torch.cuda.get_device_name = lambda *_: "cpu"


def variety(completion_ids, **_):
    return [float(len(set(ids))) for ids in completion_ids]


def recorded(queue):
    """The rollouts that the trainer takes from ``queue``, from now on."""
    taken, get = [], queue.get

    def recording(*args, **kwargs):
        taken.append(get(*args, **kwargs))
        return taken[-1]

    queue.get = recording
    return taken


class KeepVersions(TrainerCallback):
    """Copies each version of the adapter, as TRL removes those that it no longer needs."""

    def on_step_begin(self, args, state, control, **_):
        sent = Path(args.output_dir) / ".vllm_lora"
        shutil.copytree(sent, Path(args.output_dir) / "versions", dirs_exist_ok=True)


def distances(rollouts, model, folder):
    """For each rollout: version of the adapter → the largest difference of a logprob."""
    found = [{} for _ in rollouts]
    for adapter in sorted(Path(folder).iterdir()):
        served = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
        for rollout, distance in zip(rollouts, found, strict=True):
            ids = torch.tensor(rollout.input_ids)
            with torch.no_grad():
                scores = served(ids[None]).logits[0, :-1].log_softmax(-1)
            scores = scores.gather(1, ids[1:, None])[:, 0]
            drawn = torch.tensor(rollout.completion_mask[1:]).bool()
            assert drawn.any()
            distance[adapter.name] = (scores - torch.tensor(rollout.old_log_probs[1:]))[drawn].abs().max().item()
    return found


if __name__ == "__main__":
    url, model, output = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = qwen2_5_chat_template
    trainer = AsyncGRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=variety,
        args=AsyncGRPOConfig(
            output_dir=output,
            vllm_server_base_url=url,
            num_generations=4,
            max_completion_length=24,
            max_steps=4,
            max_staleness=1,
            max_inflight_tasks=8,
            per_device_train_batch_size=4,
            learning_rate=0.05,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": f"Hello {i}"}]} for i in range(8)]),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    )
    rollouts = recorded(trainer.rollout_queue)
    trainer.add_callback(KeepVersions())
    trainer.train()
    found = distances(rollouts, model, Path(output) / "versions")
    print(json.dumps({"log": trainer.state.log_history, "distances": found}))
