"""What an adapter is charged covers what a step of it takes, whatever its rank, and goes with it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from kernel_backends import needs_native

from truffula.kernels.adapters import ALIGN, COLUMNS, InputScale, SiteTensors, make_image, tensors_of
from truffula.kernels.cpu.backend import CpuBackend
from truffula.kernels.inputs import Capacity
from truffula.lora.image import ImageWriter
from truffula.testing.programs import decoder_program, pull_from, random_adapter, random_weights
from truffula.testing.tiny import tiny_config

pytestmark = needs_native
SITE_BYTES = 8 * COLUMNS + 2 * ALIGN
"""What an image takes at most for each site beside its tensors: a row of the table, and the alignment of A and B."""
RANK, TOKENS = 8192, 1024  # a product of 32 MiB beside 2 MiB of adapter

# In a process of its own, whose memory nothing else changes.
SCRIPT = """
import sys
import numpy as np, psutil
from truffula.kernels.adapters import low_rank, make_image
from truffula.kernels.cpu.backend import CpuBackend
from truffula.kernels.inputs import Capacity
from truffula.testing.programs import Part, decoder_program, fill_step, pull_from, random_weights
from truffula.testing.tiny import tiny_config

rank, tokens = map(int, sys.argv[1:])
program = decoder_program(tiny_config())
capacity = Capacity(max_tokens=tokens, max_seqs=1, max_logit_rows=1, max_segments=1, num_blocks=tokens // 4 + 2,
                    block_size=4, max_blocks_per_seq=tokens // 4 + 1)
executable = CpuBackend(threads=1).load(program, "float32", pull_from(random_weights(program)), capacity)
site = next(site for site in program.sites if site.kind == "linear")
a, b = np.ones((rank, site.in_features), np.float32), np.ones((site.out_features, rank), np.float32)
image = make_image(executable.layout, [low_rank(site.id, a, b, 1e-6)], generation="g")
rss = psutil.Process().memory_info

def step(slot):
    blocks = tuple(range(1, tokens // 4 + 1))
    fill_step(executable.inputs, [Part((1,) * tokens, 0, blocks, *slot)], 4)
    executable.run()

step(())
before = rss().rss
slot = executable.adapter(image)
step((slot,))
with_it = rss().rss
executable.drop_adapter(slot)
print(executable.adapter_bytes(image), with_it - before, rss().rss - before)
"""


def test_an_adapter_of_great_rank_pays_for_its_products() -> None:
    command = [sys.executable, "-c", SCRIPT, str(RANK), str(TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    charged, taken, left = map(int, done.stdout.split())
    products = 4 * RANK * TOKENS
    assert taken > products // 2, "the step made no such product: this measures nothing"
    assert taken <= charged + products // 8
    assert left < products // 8


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("rank", [1, 2, 4, 8, 12, 16, 64])
def test_an_adapter_takes_its_own_bytes(rank: int, dtype: str) -> None:
    """All linear modules, of widths as SmolLM2-135M has them."""
    config = tiny_config(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3)
    program = decoder_program(config)
    sites = random_adapter(program, rank=rank, dtype=dtype).sites
    tensors = {id(array): array for site in sites for part in site.parts for array in tensors_of(part)}
    own = sum(array.nbytes for array in tensors.values())
    image = ImageWriter("g", rank, sites, CpuBackend(threads=1).adapter_layout(program)).header
    assert own <= image.nbytes <= 1.02 * own + SITE_BYTES * len(sites)


def test_scaled_inputs_are_in_the_plan() -> None:
    """So that a thousand adapters of a few kilobytes, as (IA)3 has them, are charged these alone."""
    program = decoder_program(tiny_config())
    capacity = Capacity(max_tokens=64, max_seqs=4, max_logit_rows=4, max_segments=4, num_blocks=9, block_size=4,
                        max_blocks_per_seq=8)  # fmt: skip
    backend = CpuBackend(threads=1)
    executable = backend.load(program, "float32", pull_from(random_weights(program)), capacity)
    parts = [
        SiteTensors(site.id, (InputScale(np.ones(site.in_features, np.float32)),))
        for site in program.sites
        if site.kind == "linear"
    ]
    assert executable.adapter_bytes(make_image(executable.layout, parts, generation="g")) == 0
    executable.close()
