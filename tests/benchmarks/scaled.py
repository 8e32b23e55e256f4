"""CartPole with two points a step: with gamma 0.99 the values of a good policy lie near 200.

gym.make("tests.benchmarks.scaled:CartPoleTimes2-v0")   # from the root of the repository
"""

import gymnasium as gym


def make(**kwargs: object) -> gym.Env:
    """CartPole-v1 with its rewards doubled."""
    return gym.wrappers.TransformReward(
        gym.make("CartPole-v1", **kwargs), lambda reward: 2 * reward
    )


gym.register("CartPoleTimes2-v0", make)
