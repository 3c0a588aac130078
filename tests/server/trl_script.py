"""TRL's AsyncGRPO against a served model, in its own environment: ``python trl_script.py URL MODEL OUTPUT``.

It prints TRL's log as JSON, and of each rollout how far its logprobs are from those of each version of the adapter, as
peft computes them.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
import trl_on_cpu  # noqa: F401  at the top, since TRL's rollout process imports this file again
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer


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
    trainer = AsyncGRPOTrainer(
        model=model,
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
