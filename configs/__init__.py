"""Ready YAML configs and launch scripts."""
