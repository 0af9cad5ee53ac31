"""TEMPORARY stand-in until the real module lands."""
from __future__ import annotations
import math
class Trigger:
    monitor = None
class Plateau(Trigger):
    def __init__(self, monitor="train_loss", mode="min", patience=3, min_delta=1e-3, cooldown=0):
        self.monitor, self.mode, self.patience, self.min_delta, self.cooldown = monitor, mode, patience, min_delta, cooldown
        self.best, self.wait, self.cool = math.inf, 0, 0
    def observe(self, value, *, epoch, step):
        if self.cool > 0: self.cool -= 1; return
        if value < self.best - self.min_delta: self.best, self.wait = value, 0
        else: self.wait += 1
    def due(self, *, epoch, step): return self.wait >= self.patience
    def fired(self, *, epoch, step): self.best, self.wait, self.cool = math.inf, 0, self.cooldown
    def state_dict(self): return dict(best=self.best, wait=self.wait, cool=self.cool)
    def load_state_dict(self, s): self.__dict__.update(s)
Every = Plateau
