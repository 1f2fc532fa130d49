"""What steps of decoding run over stores."""

from __future__ import annotations

from graphopt_kernels import causal_convolution, rotary_cache, rotary_stores
from graphopt_kernels.attend_cross import attend_cross
from graphopt_kernels.attend_evict import attend_evict
from graphopt_kernels.attend_full import attend_full
from graphopt_kernels.attend_joint import attend_joint
from graphopt_kernels.attend_latent import attend_latent
from graphopt_kernels.attend_quant import attend_quant
from graphopt_kernels.attend_relative import attend_relative
from graphopt_kernels.attend_ring import attend_ring
from graphopt_kernels.attend_split import attend_split
from graphopt_kernels.registered.kernel import kernel

__all__ = ["KERNELS"]

KERNELS = (
    attend_full.spec,
    attend_cross.spec,
    attend_latent.spec,
    attend_relative.spec,
    attend_ring.spec,
    attend_quant.spec,
    attend_split.spec,
    attend_evict.spec,
    attend_joint.spec,
    kernel(
        "causal-convolution",
        causal_convolution.causal_convolution_reference,
        causal_convolution.causal_convolution_supports,
        "convolves new rows and the last ones before them, which it keeps",
    ),
    kernel(
        "rotary-to-cache",
        rotary_cache.rotary_to_cache_reference,
        rotary_cache.rotary_to_cache_supports,
        "rotary embeddings of a packed projection, keys and values written into a cache",
    ),
    kernel(
        "rotary-to-stores",
        rotary_stores.rotary_to_stores_reference,
        rotary_stores.rotary_to_stores_supports,
        "rotary embeddings of a step, normed or not, keys and values written into its stores",
    ),
)
