"""The attacks of foolbox and torchattacks with the parameters of ours, for the tests and the benchmark beside them."""

import math
from functools import partial

from apudae import attacks

EPSILON, STEP, STEPS = 0.1, 0.01, 22
CW = {"steps": 200, "search_steps": 5, "learning_rate": 0.05, "initial_c": 1e-2, "confidence": 0.0}
FIXED_C = {**CW, "search_steps": 1, "initial_c": 1.0}  # no search for c: torchattacks' CW
UNCLIPPED = ("cw", "cw, fixed c", "deepfool")


def ours() -> dict:
    """Name to attack(model, x, y)."""
    budget = {name: {"epsilon": EPSILON} for name in ("fgsm", "r_fgsm", "bim", "pgd")}
    unlimited = {"cw": {"epsilon": math.inf, **CW}, "deepfool": {"epsilon": math.inf}}
    unlimited["cw, fixed c"] = {"epsilon": math.inf, **FIXED_C}
    return {name: partial(getattr(attacks, name.split(",")[0]), **more) for name, more in (budget | unlimited).items()}


def foolbox() -> dict:
    """The same attacks of foolbox."""
    import foolbox as fb

    def call(attack, epsilon, model, x, y):
        return attack(fb.PyTorchModel(model, bounds=(0, 1), device=x.device), x, y, epsilons=epsilon)[1]

    iterated = {"abs_stepsize": STEP, "steps": STEPS}
    cw = {"binary_search_steps": CW["search_steps"], "steps": CW["steps"], "stepsize": CW["learning_rate"]}
    return {
        "fgsm": partial(call, fb.attacks.LinfFastGradientAttack(), EPSILON),
        "bim": partial(call, fb.attacks.LinfBasicIterativeAttack(random_start=False, **iterated), EPSILON),
        "pgd": partial(call, fb.attacks.LinfProjectedGradientDescentAttack(**iterated), EPSILON),
        "cw": partial(call, fb.attacks.L2CarliniWagnerAttack(initial_const=CW["initial_c"], **cw), None),
        "deepfool": partial(call, fb.attacks.L2DeepFoolAttack(), None),
    }


def torchattacks() -> dict:
    """The same attacks of torchattacks; its CW has one fixed c and no search."""
    import torchattacks as ta

    return {
        "fgsm": lambda model, x, y: ta.FGSM(model, eps=EPSILON)(x, y),
        "r_fgsm": lambda model, x, y: ta.RFGSM(model, eps=EPSILON, alpha=EPSILON / 2, steps=1)(x, y),
        "bim": lambda model, x, y: ta.BIM(model, eps=EPSILON, alpha=STEP, steps=STEPS)(x, y),
        "pgd": lambda model, x, y: ta.PGD(model, eps=EPSILON, alpha=STEP, steps=STEPS)(x, y),
        "cw, fixed c": lambda model, x, y: ta.CW(model, c=1, steps=CW["steps"], lr=CW["learning_rate"])(x, y),
        "deepfool": lambda model, x, y: ta.DeepFool(model)(x, y),
    }


def targeted(library: str, name: str):
    """attack(model, x, y, target) of a library: BIM at ε = .2, or PGD in L2 at ε = 2, both in 22 steps."""
    if library == "torchattacks":
        import torchattacks as ta

        def towards(model, x, y, target):
            attack = ta.BIM(model, eps=0.2, alpha=STEP, steps=42)
            attack.set_mode_targeted_by_label(quiet=True)
            return attack(x, target)

        return towards
    import foolbox as fb

    chosen = {
        "bim": (fb.attacks.LinfBasicIterativeAttack(abs_stepsize=STEP, steps=42, random_start=False), 0.2),
        "l2": (fb.attacks.L2ProjectedGradientDescentAttack(abs_stepsize=0.2, steps=22), 2.0),
    }
    attack, epsilon = chosen[name]

    def call(model, x, y, target):
        wrapped = fb.PyTorchModel(model, bounds=(0, 1), device=x.device)
        return attack(wrapped, x, fb.criteria.TargetedMisclassification(target), epsilons=epsilon)[1]

    return call
