"""TRL's AsyncGRPO on a CPU, for the scripts that import this in TRL's environment.

TRL's trainer is written for a GPU, so three things of it are replaced: the attention kernel that it fetches from the
Hub (by the same in plain torch), the name of the GPU, and the check that vLLM's package is installed, of which it uses
nothing when it sends adapters. All that speaks to the server is unchanged.
"""

from types import SimpleNamespace

import torch
from trl.experimental.async_grpo import async_rollout_worker, packing


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


packing._flash_attn = lambda: SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
async_rollout_worker.is_vllm_available = lambda: True
torch.cuda.get_device_name = lambda *_: "cpu"
