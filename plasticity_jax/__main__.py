from plasticity_jax.cli import entry

if __name__ == "__main__":
    entry()
