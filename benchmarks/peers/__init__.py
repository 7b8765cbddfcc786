"""moeprune beside the tools that do the same: time, memory and choice of experts, on the same model and token ids."""
