"Recipes: how every file in `deidnb/weights` is made"
