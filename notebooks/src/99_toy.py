# %% [markdown]
# # A toy notebook
#
# With *text*.

# %%
import matplotlib.pyplot as plt
import ipywidgets as widgets
import time
from IPython.display import display

print("hello", end="\r")
print("bye  ")

# %%
fig, ax = plt.subplots()
ax.plot([1, 2, 3]);
plt.show()

# %%
widgets.IntSlider(3)

# %%
from PIL import Image as I
import io
buf = io.BytesIO(); I.new("RGB", (30, 20), "red").save(buf, "png")
pic = widgets.Image(value=buf.getvalue())
class Bundle:
    def _repr_mimebundle_(self, **kw):
        import base64
        d = widgets.VBox([widgets.IntSlider(2), pic])._repr_mimebundle_(**kw)
        d["image/png"] = base64.b64encode(buf.getvalue()).decode()
        return d
Bundle()

# %%
from tqdm.auto import tqdm
for i in tqdm(range(3)):
    time.sleep(0.01)

# %% tags=["nbval-ignore-output"]
import sys
from tqdm import tqdm as plain
for i in plain(range(3)):
    time.sleep(0.01)
print(time.time())

# %% tags=["raises-exception"]
1 / 0

# %% tags=["nbval-ignore-output"]
plt.plot([time.time() % 1, 2]); plt.show()

# %%
{"a": 1}
