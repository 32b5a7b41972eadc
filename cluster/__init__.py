"""Where the jobs run: machines, images, manifests, rights, and what to look at before anything is submitted."""
