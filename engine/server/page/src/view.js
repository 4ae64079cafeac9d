import { signal } from "@preact/signals";

export const side = signal("chat"); // what a narrow screen shows
export const chosenId = signal(null); // id of the request whose life is shown
