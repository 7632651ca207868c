"""This machine, as root or as a user with passwordless sudo."""

hosts = ["@local"]
