"""distrl: from raw interaction logs in object storage to a promoted sequential recommender."""
