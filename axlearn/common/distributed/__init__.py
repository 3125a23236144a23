"""Which process of a run this one is, and how all of them find each other before jax starts; loads no jax.

`find_place` reads it from flags and the environment, `hold_roll_call` waits until everybody is there, or says who is
missing. `launch.setup` does both. A guide for users: `docs/hosts.md`.
"""

from axlearn.common.distributed._place import HEARTBEAT_TIMEOUT_SECONDS as HEARTBEAT_TIMEOUT_SECONDS
from axlearn.common.distributed._place import INITIALIZATION_TIMEOUT_SECONDS as INITIALIZATION_TIMEOUT_SECONDS
from axlearn.common.distributed._place import Place as Place
from axlearn.common.distributed._place import find_place as find_place
from axlearn.common.distributed._roll_call import PeersMissingError as PeersMissingError
from axlearn.common.distributed._roll_call import hold_roll_call as hold_roll_call
