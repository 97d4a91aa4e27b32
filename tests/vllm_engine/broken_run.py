"""main_ppo with a worker whose engine keeps its old LM head: python broken_run.py key=value ..."""

import sys

from ray import cloudpickle

from verl.trainer import main_ppo
from verl.workers.fsdp_workers import ActorRolloutRefWorker


class StaleHeadWorker(ActorRolloutRefWorker):
    """The first sync is whole; from the second on, the head is not renewed."""

    def update_actor(self, rows, num_mini_batches):
        self.rollout._repack_head = lambda: None
        return super().update_actor(rows, num_mini_batches)

    update_actor.dispatch_mode = ActorRolloutRefWorker.update_actor.dispatch_mode


if __name__ == "__main__":
    cloudpickle.register_pickle_by_value(sys.modules["__main__"])
    main_ppo.ActorRolloutRefWorker = StaleHeadWorker
    sys.exit(main_ppo.main())
