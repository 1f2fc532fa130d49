"""Every private torch API that graphopt touches, and nothing else.

Each function is tested on every supported torch version in ``tests/test_private_torch.py``.
"""

from __future__ import annotations
