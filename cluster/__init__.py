"""Getting a command onto a Ray cluster: Ray's job server, KubeRay, `ray up`. Imports nothing of the other packages."""
