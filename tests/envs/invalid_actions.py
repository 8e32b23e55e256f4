"""sb3-contrib's environments with `action_masks()`, under ids of Gymnasium."""

import gymnasium as gym
from sb3_contrib.common.envs import InvalidActionEnvDiscrete, InvalidActionEnvMultiDiscrete

kwargs = {"dim": 20, "n_invalid_actions": 10}
gym.register("InvalidActionDiscrete-v0", InvalidActionEnvDiscrete, kwargs=kwargs)
kwargs = {"dims": [2, 3], "n_invalid_actions": 1}
gym.register("InvalidActionMultiDiscrete-v0", InvalidActionEnvMultiDiscrete, kwargs=kwargs)
