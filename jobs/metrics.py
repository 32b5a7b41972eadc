"""A run's progress as Ray metrics, which the cluster's Prometheus endpoints give: gauges, by output."""

from typing import Any

NAMES = {
    "pictures": "pictures annotated by this driver",
    "persons": "persons annotated by this driver",
    "rejected": "pictures rejected",
    "units_done": "units that are committed",
    "units": "units that this driver has to do",
    "persons_per_s": "persons computed per second since the first unit began",
}


class RunMetrics:
    """Gauges `ray_pose_annotate_<name>` with the tag `output`; without a running Ray it does nothing."""

    def __init__(self, output: str) -> None:
        import ray
        from ray.util.metrics import Gauge

        self._gauges = {}
        if ray.is_initialized():
            self._gauges = {name: Gauge(f"pose_annotate_{name}", description=text, tag_keys=("output",))
                            for name, text in NAMES.items()}
        for gauge in self._gauges.values():
            gauge.set_default_tags({"output": output})

    def tell(self, so_far: dict[str, Any]) -> None:
        """Set the gauges to what `Progress.so_far` says."""
        for name, gauge in self._gauges.items():
            gauge.set(float(so_far[name]))
