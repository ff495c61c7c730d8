"""For tests of one's own: a machine whose times can be worked out by hand, small random runs, and conformance checks.

`check("eviction", "mru")` asks of a member of a table what is asked of those that ship.
"""

from .conformance import CONFORMANCE as CONFORMANCE
from .conformance import check as check
from .machine import RoundCosts as RoundCosts
from .machine import RoundSizes as RoundSizes
from .machine import record as record
from .machine import tiny_inputs as tiny_inputs
from .machine import tiny_model as tiny_model
from .machine import tiny_profile as tiny_profile
from .machine import tiny_run as tiny_run
from .machine import tiny_scenario as tiny_scenario
from .machine import tiny_trace as tiny_trace
from .random_runs import random_inputs as random_inputs
from .random_runs import random_trace as random_trace
from .serving import serve as serve
from .serving import tiny_requests as tiny_requests
from .serving import tiny_server as tiny_server
