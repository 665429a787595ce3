"""A command on a Ray cluster: Ray's job server, KubeRay, `ray up`. It imports the recipe alone."""
