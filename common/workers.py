"""Where the back end of your own Gymnasium environments stood before; `common.envs.workers` is its place now."""

from common.envs.workers import WorkerError, WorkerVectorEnv  # noqa: F401
