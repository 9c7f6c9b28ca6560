"""A Kubernetes control plane on loopback: the real kube-apiserver and etcd, two processes, and
kubectl. ``make test-cluster`` compiles them into one program."""

from controlplane.process import PROGRAM
from controlplane.server import ADMIN, USERS, ControlPlane

__all__ = ["ADMIN", "PROGRAM", "USERS", "ControlPlane"]
