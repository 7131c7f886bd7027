"""The project's own tests are run by the project, in its own environment."""

collect_ignore = ["project"]
