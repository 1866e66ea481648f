"""Rollouts: prompts, the responses a policy gave, and how they are sampled."""
