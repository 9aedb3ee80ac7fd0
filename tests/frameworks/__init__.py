"""Other people's trainers, gated by the lines that their docs page shows. `make frameworks` installs and runs them."""
