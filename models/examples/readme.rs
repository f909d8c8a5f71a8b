//! Prints the `README.md` of a model folder, as the bundled ones have it:
//!
//!     cargo run -p understudy-models --example readme -- models/zoo/fashion-mnist-student

use std::{env, path::Path};

use understudy_models::{Error, Result, checkpoint::ModelFolder};

fn main() -> Result<()> {
    let folder = env::args().nth(1);
    let folder = folder.ok_or_else(|| Error::value("FOLDER", "absent", "name a model folder"))?;
    print!("{}", ModelFolder::open(Path::new(&folder))?.readme());
    Ok(())
}
