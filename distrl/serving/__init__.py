"""What answers requests: a trained model in a folder without pickles, and the top items of it.

Runs where neither Ray nor DeepSpeed is installed: its code travels inside the MLflow model.
"""
