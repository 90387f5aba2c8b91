"""What a training and an export leave on disk: runs, bundles, their manifests and signatures."""
