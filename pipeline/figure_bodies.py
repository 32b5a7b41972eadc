"""Bodies for made pictures: a random pose, as joints in space. It knows angles and lengths, not how to draw.

Lengths are in body heights. A person's own frame is (towards the person's left, up, forward); what comes out is
the viewer's frame: (right, down, towards the viewer), with the middle of the hips at the origin.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Angles = tuple[float, float, float, float]

LEFT, RIGHT = 1.0, -1.0
SHOULDER, HIP, TORSO, NECK = 0.115, 0.075, 0.29, 0.115
UPPER_ARM, FOREARM, THIGH, SHANK, FOOT = 0.165, 0.15, 0.235, 0.235, 0.085
HEAD = 0.075
# In the head's frame: nose, left eye, right eye, left ear, right ear, in COCO's order.
FACE = np.array([[0.0, -0.02, 1.08], [0.4, 0.25, 0.85], [-0.4, 0.25, 0.85], [1.0, 0.05, 0.0], [-1.0, 0.05, 0.0]])


@dataclass(frozen=True)
class Pose:
    """Angles in degrees. A limb's are (upper outward, upper forward, lower outward, lower forward), from hanging
    down; `roll` leans the trunk to the person's left, `pitch` forward."""

    left_arm: Angles
    right_arm: Angles
    left_leg: Angles
    right_leg: Angles
    roll: float = 0.0
    pitch: float = 0.0


@dataclass(frozen=True)
class Body:
    """A posed body in the viewer's frame.

    joints  float64 [17, 3] in COCO's order; toes [2, 3] left, right; head, neck [3]; ahead [3]: where it faces
    """

    joints: Floats
    toes: Floats
    head: Floats
    neck: Floats
    ahead: Floats


def random_body(generator: np.random.Generator) -> Body:
    """A body in a random pose from a random side: standing, walking, arms up, reaching, sitting or leaning."""
    kind = str(generator.choice(list(POSES), p=list(POSE_SHARES)))
    return posed_body(POSES[kind](generator), yaw_deg=_yaw(generator, kind), elevation_deg=generator.uniform(2, 22))


def posed_body(pose: Pose, *, yaw_deg: float, elevation_deg: float) -> Body:
    """The body of a pose: yaw 0 faces the viewer, 90 faces right; the viewer looks down by the elevation."""
    trunk = _roll(pose.roll) @ _pitch(pose.pitch)
    neck = trunk @ np.array([0.0, TORSO, 0.0])
    head = neck + trunk @ np.array([0.0, NECK, 0.015])
    face = head + (FACE * HEAD) @ trunk.T
    arms = [_arm(trunk, side, angles) for side, angles in ((LEFT, pose.left_arm), (RIGHT, pose.right_arm))]
    legs = [_leg(side, angles) for side, angles in ((LEFT, pose.left_leg), (RIGHT, pose.right_leg))]
    # Left and right take turns in COCO's order: shoulders, elbows, wrists; hips, knees, ankles.
    limbs = [joint for pair in (zip(*arms, strict=True), zip(*legs, strict=True)) for both in pair for joint in both]
    joints, toes = np.array([*face, *limbs[:12]]), np.array(limbs[12:])
    view = _view(yaw_deg, elevation_deg)
    ahead = trunk @ np.array([0.0, 0.0, 1.0])
    return Body(joints @ view.T, toes @ view.T, view @ head, view @ neck, view @ ahead)


def _arm(trunk: Floats, side: float, angles: Angles) -> list[Floats]:
    shoulder = trunk @ np.array([side * SHOULDER, TORSO - 0.01, 0.0])
    elbow = shoulder + UPPER_ARM * trunk @ _direction(side, angles[0], angles[1])
    return [shoulder, elbow, elbow + FOREARM * trunk @ _direction(side, angles[2], angles[3])]


def _leg(side: float, angles: Angles) -> list[Floats]:
    hip = np.array([side * HIP, 0.0, 0.0])
    knee = hip + THIGH * _direction(side, angles[0], angles[1])
    ankle = knee + SHANK * _direction(side, angles[2], angles[3])
    return [hip, knee, ankle, ankle + FOOT * np.array([0.3 * side, -0.25, 0.9])]


def _direction(side: float, outward_deg: float, forward_deg: float) -> Floats:
    outward, forward = np.deg2rad(outward_deg), np.deg2rad(forward_deg)
    return np.array([side * np.sin(outward), -np.cos(outward) * np.cos(forward), np.cos(outward) * np.sin(forward)])


def _roll(degrees: float) -> Floats:
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])


def _pitch(degrees: float) -> Floats:
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.array([[1.0, 0.0, 0.0], [0.0, cos, -sin], [0.0, sin, cos]])


def _view(yaw_deg: float, elevation_deg: float) -> Floats:
    """From a person's frame to the viewer's; the left hand of who faces the viewer is on the right."""
    yaw, elevation = np.deg2rad(yaw_deg), np.deg2rad(elevation_deg)
    turned = np.array(
        [[np.cos(yaw), 0.0, np.sin(yaw)], [0.0, 1.0, 0.0], [-np.sin(yaw), 0.0, np.cos(yaw)]]
    )  # right, up, near
    cos, sin = np.cos(elevation), np.sin(elevation)
    seen: Floats = np.array([[1.0, 0.0, 0.0], [0.0, -cos, sin], [0.0, sin, cos]]) @ turned
    return seen


def _yaw(generator: np.random.Generator, kind: str) -> float:
    if kind == "walking" or generator.random() < 0.2:
        return float(generator.choice([-1, 1]) * generator.uniform(25, 110))
    away = 180.0 if generator.random() < 0.15 else 0.0
    return float(away + generator.uniform(-40, 40))


# Poses


def _hanging_arm(generator: np.random.Generator) -> Angles:
    out, forward = generator.uniform(4, 28), generator.uniform(-12, 20)
    return out, forward, out + generator.uniform(-25, 8), forward + generator.uniform(0, 45)


def _raised_arm(generator: np.random.Generator) -> Angles:
    out = generator.uniform(100, 170)
    return out, generator.uniform(-10, 15), out + generator.uniform(-10, 60), generator.uniform(-10, 25)


def _reaching_arm(generator: np.random.Generator) -> Angles:
    out, forward = generator.uniform(30, 100), generator.uniform(0, 60)
    return out, forward, out + generator.uniform(-60, 40), forward + generator.uniform(-10, 40)


def _akimbo_arm(generator: np.random.Generator) -> Angles:
    return generator.uniform(35, 55), generator.uniform(-15, 10), generator.uniform(-60, -35), generator.uniform(0, 25)


def _any_arm(generator: np.random.Generator) -> Angles:
    arms = (_hanging_arm, _hanging_arm, _raised_arm, _reaching_arm, _akimbo_arm)
    return arms[generator.integers(len(arms))](generator)


def _standing_leg(generator: np.random.Generator) -> Angles:
    out, forward = generator.uniform(0, 14), generator.normal(2, 4)
    return out, forward, out * generator.uniform(0.2, 1.0), forward - generator.uniform(0, 8)


def _standing(generator: np.random.Generator) -> Pose:
    return Pose(_hanging_arm(generator), _hanging_arm(generator), _standing_leg(generator), _standing_leg(generator))


def _walking(generator: np.random.Generator) -> Pose:
    swing = generator.choice([-1, 1]) * generator.uniform(14, 34)
    bend = generator.uniform(4, 40, 4)
    return Pose(
        (8.0, -swing, 8.0, -swing + bend[0]),
        (8.0, swing, 8.0, swing + bend[1]),
        (2.0, swing, 2.0, swing - bend[2]),
        (2.0, -swing, 2.0, -swing - bend[3]),
        pitch=generator.uniform(0, 8),
    )


def _arms_up(generator: np.random.Generator) -> Pose:
    return Pose(_raised_arm(generator), _raised_arm(generator), _standing_leg(generator), _standing_leg(generator))


def _reaching(generator: np.random.Generator) -> Pose:
    return Pose(
        _any_arm(generator),
        _any_arm(generator),
        _standing_leg(generator),
        _standing_leg(generator),
        roll=generator.normal(0, 5),
    )


def _sitting(generator: np.random.Generator) -> Pose:
    legs = [
        (generator.uniform(4, 22), generator.uniform(62, 90), generator.uniform(-5, 8), generator.uniform(-20, 15))
        for _ in range(2)
    ]
    return Pose(_any_arm(generator), _any_arm(generator), legs[0], legs[1], pitch=generator.uniform(-8, 20))


def _leaning(generator: np.random.Generator) -> Pose:
    return Pose(
        _any_arm(generator),
        _any_arm(generator),
        _standing_leg(generator),
        _standing_leg(generator),
        roll=generator.choice([-1, 1]) * generator.uniform(8, 40),
        pitch=generator.uniform(-5, 45),
    )


POSES: dict[str, Callable[[np.random.Generator], Pose]] = {
    "standing": _standing,
    "walking": _walking,
    "arms up": _arms_up,
    "reaching": _reaching,
    "sitting": _sitting,
    "leaning": _leaning,
}
POSE_SHARES = (0.15, 0.2, 0.12, 0.25, 0.13, 0.15)
