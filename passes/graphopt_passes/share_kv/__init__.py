"""share-kv: attentions read the keys and values of earlier ones; see ``share_kv.kv_pass``."""

from graphopt_passes.share_kv.kv_pass import ShareKv

__all__ = ["ShareKv"]
