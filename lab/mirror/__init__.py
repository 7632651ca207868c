"""The lab's stand-in for the outside world, so that a lab host needs no Internet: one process, four servers.

    port 8900   /simple/  the Python package index of the wheels that locks/*.txt name   (index.py, wheelhouse.py)
                /python/  stand-in for python-build-standalone, where uv gets Pythons    (python_builds.py)
    port 8901             a Hugging-Face-compatible hub with the trial model, and faults (hub.py, model.py)
    port 8902             stand-ins for the apt repositories of NVIDIA and Docker        (vendor.py)
    port 3142             a caching proxy in front of the distributions' own archives    (apt.py)

`python -m lab.mirror prepare` fills the cache, `python -m lab.mirror serve --bind IP` serves from it.
"""

from __future__ import annotations

INDEX_PORT = 8900
HUB_PORT = 8901
VENDOR_PORT = 8902
APT_PROXY_PORT = 3142
