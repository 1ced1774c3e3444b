"""What each command does, behind the command line: plain functions of a spec."""

from streaminfer.commands.messages import send, watch
from streaminfer.commands.plans import (
    cuts,
    plan_of,
    print_cuts,
    print_plan,
    print_verified,
    topics_apply,
    topics_diff,
    verify,
)
from streaminfer.commands.replan import print_advice, replan
from streaminfer.commands.serve import run, targets, worker
from streaminfer.commands.settings import config_text
from streaminfer.commands.simulate import Ask, predict, print_simulated

__all__ = [
    "Ask",
    "config_text",
    "cuts",
    "plan_of",
    "predict",
    "print_advice",
    "print_cuts",
    "print_plan",
    "print_simulated",
    "print_verified",
    "replan",
    "run",
    "send",
    "targets",
    "topics_apply",
    "topics_diff",
    "verify",
    "watch",
    "worker",
]
