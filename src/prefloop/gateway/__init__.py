"""An OpenAI-compatible endpoint in front of a policy: an agent changes its `base_url`, its runs become trajectories.

In this process, an environment opens each episode, runs an agent against the endpoint, and closes it:

    gateway = Gateway(renderer, batcher, provenance, max_context, sampling, settings)
    with GatewayServer(gateway, port=0) as server:
        name = ("task", "episode")                          # any texts; a pair is used once
        gateway.open(name, Attempt(task, sample, seed))     # the trajectory's id and draws are functions of it
        run_agent(env={**os.environ, **server.environment(name)})   # OPENAI_BASE_URL and OPENAI_API_KEY
        rollout = gateway.close(name, outcome)              # or ended=Ended.ERROR, error="the agent crashed"
    batcher.close()

All of it may be called from any thread, for many episodes at once. `batcher` is a `ContinuousBatcher` over a
`LocalSampler`, a `ProcessBatcher`, which has one in a process of its own and leaves it the whole of its CPU, or a
`ServedBatcher` over a sampler whose server batches. An episode that overran a limit stays open
for its owner: its requests are refused, and `close` gives it with that end.
"""

from prefloop.gateway.batcher import Batcher, ContinuousBatcher, ServedBatcher
from prefloop.gateway.core import Gateway, key_of
from prefloop.gateway.process import ProcessBatcher
from prefloop.gateway.refusal import RefusedError
from prefloop.gateway.server import GatewayServer
from prefloop.gateway.settings import GatewaySettings

__all__ = [
    "Batcher",
    "ContinuousBatcher",
    "Gateway",
    "GatewayServer",
    "GatewaySettings",
    "ProcessBatcher",
    "RefusedError",
    "ServedBatcher",
    "key_of",
]
